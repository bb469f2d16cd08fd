//! Arrays as foreign files store them: number types, strides, and how much a file may claim.

/// Most dimensions an array may have.
pub const MAX_DIMS: usize = 16;

/// A named-dtype array in memory, row-major, its values as `f32`.
#[derive(Clone, Debug, PartialEq)]
pub struct TensorData {
    /// Length of each dimension.
    pub shape: Vec<usize>,
    /// All values, row-major.
    pub values: Vec<f32>,
    /// Type of the numbers in the file, such as `float16` or `int64`.
    pub dtype: &'static str,
}

/// Number types of PyTorch, NumPy and safetensors files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Element {
    /// IEEE half precision.
    F16,
    /// The upper half of an `f32`.
    Bf16,
    /// Single precision.
    F32,
    /// Double precision.
    F64,
    /// 64-bit integer.
    I64,
    /// 32-bit integer.
    I32,
    /// 16-bit integer.
    I16,
    /// 8-bit integer.
    I8,
    /// Unsigned 8-bit integer.
    U8,
    /// One byte per truth value.
    Bool,
}

impl Element {
    /// What NumPy and PyTorch call it.
    pub fn name(self) -> &'static str {
        match self {
            Self::F16 => "float16",
            Self::Bf16 => "bfloat16",
            Self::F32 => "float32",
            Self::F64 => "float64",
            Self::I64 => "int64",
            Self::I32 => "int32",
            Self::I16 => "int16",
            Self::I8 => "int8",
            Self::U8 => "uint8",
            Self::Bool => "bool",
        }
    }

    /// Bytes of one.
    pub fn size(self) -> usize {
        match self {
            Self::F64 | Self::I64 => 8,
            Self::F32 | Self::I32 => 4,
            Self::F16 | Self::Bf16 | Self::I16 => 2,
            Self::I8 | Self::U8 | Self::Bool => 1,
        }
    }

    /// The type of a safetensors file, unless we don't read it.
    pub fn of_safetensors(dtype: safetensors::Dtype) -> Option<Self> {
        use safetensors::Dtype;
        Some(match dtype {
            Dtype::F16 => Self::F16,
            Dtype::BF16 => Self::Bf16,
            Dtype::F32 => Self::F32,
            Dtype::F64 => Self::F64,
            Dtype::I64 => Self::I64,
            Dtype::I32 => Self::I32,
            Dtype::I16 => Self::I16,
            Dtype::I8 => Self::I8,
            Dtype::U8 => Self::U8,
            Dtype::BOOL => Self::Bool,
            _ => return None,
        })
    }

    /// Whole elements of `bytes` as `f32`.
    pub fn decode(self, bytes: &[u8], big: bool) -> Vec<f32> {
        if let (Self::F32, false, (words, _)) = (self, big, bytes.as_chunks()) {
            return words.iter().map(|&word| f32::from_le_bytes(word)).collect();
        }
        let one = |bytes: &[u8]| {
            let mut le = [0u8; 8];
            let le = &mut le[..bytes.len()];
            le.copy_from_slice(bytes);
            if big {
                le.reverse();
            }
            match (self, &*le) {
                (Self::F16, &[a, b]) => half::f16::from_le_bytes([a, b]).to_f32(),
                (Self::Bf16, &[a, b]) => half::bf16::from_le_bytes([a, b]).to_f32(),
                (Self::I16, &[a, b]) => f32::from(i16::from_le_bytes([a, b])),
                (Self::F32, &[a, b, c, d]) => f32::from_le_bytes([a, b, c, d]),
                (Self::I32, &[a, b, c, d]) => i32::from_le_bytes([a, b, c, d]) as f32,
                (Self::F64, &[a, b, c, d, e, f, g, h]) => f64::from_le_bytes([a, b, c, d, e, f, g, h]) as f32,
                (Self::I64, &[a, b, c, d, e, f, g, h]) => i64::from_le_bytes([a, b, c, d, e, f, g, h]) as f32,
                (Self::I8, &[a]) => f32::from(a as i8),
                (_, &[a]) => f32::from(a),
                _ => unreachable!("chunks have the element's size"),
            }
        };
        bytes.chunks_exact(self.size()).map(one).collect()
    }
}

/// The product of a shape, unless it overflows.
pub fn element_count(shape: &[usize]) -> Option<usize> {
    // A zero must not hide an overflow: strides are products of the other lengths.
    shape.iter().try_fold(1usize, |product, &len| product.checked_mul(len.max(1)))?;
    Some(shape.iter().product())
}

/// Whether strides are those of a row-major array; dimensions of length 1 don't matter.
pub fn is_row_major(shape: &[usize], strides: &[usize]) -> bool {
    let mut expected = 1usize;
    shape.iter().zip(strides).rev().all(|(&len, &stride)| {
        let right = len == 1 || stride == expected;
        expected = expected.saturating_mul(len);
        right
    })
}

/// Values at `offset + Σ index · stride`, row-major over `shape`; `None` if one lies outside.
pub fn gather(values: &[f32], offset: usize, shape: &[usize], strides: &[usize]) -> Option<Vec<f32>> {
    let count = element_count(shape)?;
    if shape.len() != strides.len() {
        return None;
    }
    if count == 0 {
        return Some(Vec::new());
    }
    let last = shape
        .iter()
        .zip(strides)
        .try_fold(offset, |at, (&len, &stride)| at.checked_add((len - 1).checked_mul(stride)?))?;
    if last >= values.len() {
        return None;
    }
    if is_row_major(shape, strides) {
        return Some(values[offset..=last].to_vec());
    }
    let mut out = Vec::with_capacity(count);
    let mut index = vec![0; shape.len()];
    let mut at = offset;
    loop {
        out.push(values[at]);
        let mut dim = shape.len();
        loop {
            if dim == 0 {
                return Some(out);
            }
            dim -= 1;
            index[dim] += 1;
            at += strides[dim];
            if index[dim] < shape[dim] {
                break;
            }
            at -= strides[dim] * shape[dim];
            index[dim] = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strides_of_length_one_do_not_matter() {
        assert!(is_row_major(&[2, 3, 1], &[3, 1, 99]));
        assert!(!is_row_major(&[3, 3, 1], &[1, 3, 3]));
        let values: Vec<f32> = (0..9u8).map(f32::from).collect();
        assert_eq!(gather(&values, 0, &[3, 3, 1], &[3, 1, 7]), Some(values.clone()));
        assert_eq!(gather(&values, 0, &[2, 2], &[1, 3]), Some(vec![0.0, 3.0, 1.0, 4.0]));
        assert_eq!(gather(&values, 4, &[2, 3], &[3, 1]), None);
        assert_eq!(gather(&values, 0, &[usize::MAX, 2], &[0, 0]), None);
    }
}
