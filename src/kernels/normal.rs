//! Standard normal values from uniform words, by Box and Muller 1958.

use super::real::ln;
use multiversion::multiversion;

/// A value for each pair of words: `√(−2 ln u) · cos 2πv`, `u` above 0 and at most 1 by the first word, `v` by the
/// second, in f32; off the exact value by less than 1e-5, and by up to 4e-4 among the values that are nearly 0
/// because `u` is nearly 1.
#[multiversion(targets("x86_64+avx2"))]
pub fn normals(words: &[[u32; 2]], out: &mut [f32]) {
    words.iter().zip(out).for_each(|(&words, out)| *out = normal(words));
}

/// One of [`normals`].
#[inline(always)]
pub fn normal([radius, angle]: [u32; 2]) -> f32 {
    const WORD: f32 = 1.0 / 4_294_967_296.0;
    // rounded up to 1, the logarithm is 0
    let square = -2.0 * ln((radius as f32 + 1.0) * WORD);
    // cos 2πv = sin 2π(¼ − |v|) for v between −½ and ½: the sine's series up to 2π/4
    let y = (0.25 - (angle.cast_signed() as f32 * WORD).abs()) * std::f32::consts::TAU;
    let s = y * y;
    let p = -2.505_210_8e-8;
    let p = p * s + 2.755_731_9e-6;
    let p = p * s - 1.984_127e-4;
    let p = p * s + 8.333_334e-3;
    let p = p * s - 1.666_666_7e-1;
    square.max(0.0).sqrt() * (p * s * y + y)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_those_of_the_definition() {
        let edges =
            [0, 1, 2, 255, 1 << 16, 1 << 30, (1 << 30) + 1, 1 << 31, (1 << 31) + 1, 3 << 30, u32::MAX - 1, u32::MAX];
        let scattered = (0..100_000_u32).map(|i| [i.wrapping_mul(2_654_435_761), i.wrapping_mul(40_503_001)]);
        let words: Vec<[u32; 2]> = edges.iter().flat_map(|&a| edges.map(|b| [a, b])).chain(scattered).collect();
        let mut values = vec![0.0; words.len()];
        normals(&words, &mut values);
        for (words, value) in words.iter().zip(values) {
            assert_eq!(value, normal(*words), "alone and in a row");
            let [u, v] = words.map(|word| f64::from(word) / 4_294_967_296.0);
            let exact = (-2.0 * (u + 1.0 / 4_294_967_296.0).ln()).sqrt() * (std::f64::consts::TAU * v).cos();
            // where u is nearly 1 it has the steps of f32, and the radius their root
            let most = if words[0] > u32::MAX - (1 << 16) { 4e-4 } else { 1e-5 };
            assert!((f64::from(value) - exact).abs() < most, "{words:?}: {value}, exactly {exact}");
        }
    }
}
