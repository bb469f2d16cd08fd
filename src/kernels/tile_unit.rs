//! A tile unit (Intel AMX) in software, for tests on processors without one: of [`super::refused`]. Intel SDM,
//! volume 2.

use iced_x86::{Code, Instruction, Register};

/// Of one thread, what a processor keeps.
pub(super) struct TileUnit {
    /// Rows and bytes of a row of each tile, once they are set up.
    shapes: Option<[(usize, usize); 8]>,
    tiles: [[u8; 1024]; 8],
}

impl TileUnit {
    /// Not set up.
    pub const NEW: Self = Self { shapes: None, tiles: [[0; 1024]; 8] };

    /// Does what an instruction does; `address` gives the first of its addresses, and the stride.
    ///
    /// # Errors
    /// If it isn't one of tiles, or a processor would refuse it.
    pub fn execute(&mut self, instruction: &Instruction, address: &dyn Fn() -> (usize, usize)) -> Result<(), String> {
        let tile = |operand| instruction.op_register(operand) as usize - Register::TMM0 as usize;
        match instruction.code() {
            Code::VEX_Ldtilecfg_m512 => {
                // SAFETY: the instruction reads 64 bytes there, as here.
                let config = unsafe { std::slice::from_raw_parts(address().0 as *const u8, 64) };
                if config[0] != 1 || config[1..16].iter().any(|&byte| byte != 0) {
                    return Err("a palette other than 1, or reserved bytes".into());
                }
                let mut shapes = [(0, 0); 8];
                for (i, shape) in shapes.iter_mut().enumerate() {
                    let bytes = usize::from(u16::from_le_bytes([config[16 + 2 * i], config[17 + 2 * i]]));
                    *shape = (usize::from(config[48 + i]), bytes);
                    if shape.0 > 16 || bytes > 64 || (shape.0 == 0) != (bytes == 0) {
                        return Err(format!("a tile of {shape:?}"));
                    }
                }
                if config[32..48].iter().chain(&config[56..]).any(|&byte| byte != 0) {
                    return Err("more than eight tiles".into());
                }
                (self.shapes, self.tiles) = (Some(shapes), [[0; 1024]; 8]);
            }
            Code::VEX_Tilerelease => (self.shapes, self.tiles) = (None, [[0; 1024]; 8]),
            Code::VEX_Tilezero_tmm => {
                self.shape(tile(0))?;
                self.tiles[tile(0)] = [0; 1024];
            }
            Code::VEX_Tileloadd_tmm_sibmem => {
                let (rows, bytes) = self.shape(tile(0))?;
                let (first, stride) = address();
                self.tiles[tile(0)] = [0; 1024];
                for row in 0..rows {
                    // SAFETY: the instruction reads these bytes, as here.
                    let values =
                        unsafe { std::slice::from_raw_parts(first.wrapping_add(row * stride) as *const u8, bytes) };
                    self.tiles[tile(0)][row * 64..][..bytes].copy_from_slice(values);
                }
            }
            Code::VEX_Tilestored_sibmem_tmm => {
                let (rows, bytes) = self.shape(tile(1))?;
                let (first, stride) = address();
                for row in 0..rows {
                    let values = &self.tiles[tile(1)][row * 64..][..bytes];
                    // SAFETY: the instruction writes these bytes, as here.
                    unsafe {
                        let to = first.wrapping_add(row * stride) as *mut u8;
                        std::ptr::copy_nonoverlapping(values.as_ptr(), to, bytes);
                    }
                }
            }
            Code::VEX_Tdpbf16ps_tmm_tmm_tmm => self.multiply_add(tile(0), tile(1), tile(2))?,
            _ => return Err("no instruction of tiles".into()),
        }
        Ok(())
    }

    fn shape(&self, tile: usize) -> Result<(usize, usize), String> {
        let (rows, bytes) = self.shapes.ok_or("tiles aren't set up")?[tile];
        if rows == 0 { Err(format!("tile {tile} has no rows")) } else { Ok((rows, bytes)) }
    }

    /// Pairs of bf16 of `a`'s rows times those of `b`'s columns, added to `sums`.
    fn multiply_add(&mut self, sums: usize, a: usize, b: usize) -> Result<(), String> {
        let (shape, (a_rows, a_bytes), (b_rows, b_bytes)) = (self.shape(sums)?, self.shape(a)?, self.shape(b)?);
        if shape != (a_rows, b_bytes) || a_bytes / 4 != b_rows || sums == a || sums == b || a == b {
            return Err(format!("tiles {sums}, {a} and {b} don't fit"));
        }
        let tiles = &self.tiles;
        let bfloat = |tile: usize, row: usize, value: usize| {
            let at = row * 64 + 2 * value;
            half::bf16::from_le_bytes([tiles[tile][at], tiles[tile][at + 1]]).to_f32()
        };
        let mut out = self.tiles[sums];
        for (row, column) in (0..a_rows).flat_map(|row| (0..b_bytes / 4).map(move |column| (row, column))) {
            let mut halves = [0.0_f32; 2];
            for k in 0..b_rows {
                for (i, sum) in halves.iter_mut().enumerate() {
                    *sum = bfloat(a, row, 2 * k + i).mul_add(bfloat(b, k, 2 * column + i), *sum);
                }
            }
            let at = row * 64 + 4 * column;
            let place: &mut [u8; 4] = (&mut out[at..at + 4]).try_into().expect("four bytes");
            *place = (f32::from_le_bytes(*place) + (halves[0] + halves[1])).to_le_bytes();
        }
        self.tiles[sums] = out;
        Ok(())
    }
}
