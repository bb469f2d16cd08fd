//! The time that this process has had of the processor, all its threads together: on a busy machine
//! a measure of work, where the clock on the wall is none.

#[cfg(any(not(unix), test))]
use std::time::Instant;

/// Seconds of one core that this process has used so far; where the system doesn't tell, seconds since
/// the first call.
pub fn cpu_seconds() -> f64 {
    #[cfg(unix)]
    {
        use rustix::time::{ClockId, clock_gettime};
        let now = clock_gettime(ClockId::ProcessCPUTime);
        now.tv_sec as f64 + now.tv_nsec as f64 / 1e9
    }
    #[cfg(not(unix))]
    {
        static START: std::sync::OnceLock<Instant> = std::sync::OnceLock::new();
        START.get_or_init(Instant::now).elapsed().as_secs_f64()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(unix)]
    #[test]
    fn work_takes_time() {
        let begun = Instant::now();
        let before = cpu_seconds();
        let mut x = 1.0_f64;
        while begun.elapsed().as_millis() < 30 {
            x = std::hint::black_box(x.sin() + 1.0);
        }
        assert!(cpu_seconds() > before);
    }
}
