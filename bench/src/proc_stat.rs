//! What the kernel says of a process: the CPU time that it took, and its resident memory.

use std::{fs, time::Duration};

use anyhow::Context as _;
use rustix::param::clock_ticks_per_second;

/// CPU time of a process since its start, of all its threads in user and kernel mode together.
pub(crate) fn cpu_time(pid: u32) -> anyhow::Result<Duration> {
    let path = format!("/proc/{pid}/stat");
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read `{path}`"))?;
    let ticks = cpu_ticks(&text).with_context(|| format!("`{path}` is not as proc(5) says"))?;
    let nanoseconds = u128::from(ticks) * 1_000_000_000 / u128::from(clock_ticks_per_second());
    Ok(Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(u64::MAX)))
}

/// Resident memory of a process now, in bytes.
pub(crate) fn resident_bytes(pid: u32) -> anyhow::Result<u64> {
    let path = format!("/proc/{pid}/status");
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read `{path}`"))?;
    resident(&text).with_context(|| format!("`{path}` is not as proc(5) says"))
}

/// `utime` and `stime` of `/proc/<pid>/stat`, in clock ticks.
fn cpu_ticks(stat: &str) -> Option<u64> {
    // The second field is the program's name in parentheses, which may hold spaces and parentheses.
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace().skip(11);
    let (user, kernel) = (fields.next()?.parse::<u64>().ok()?, fields.next()?.parse::<u64>().ok()?);
    Some(user + kernel)
}

/// `VmRSS` of `/proc/<pid>/status`, in bytes.
fn resident(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kilobytes: u64 = line.trim().strip_suffix(" kB")?.parse().ok()?;
    Some(kilobytes << 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_time_is_read_past_a_program_name_with_spaces_and_parentheses() {
        let stat = "42 (a) b (c) S 1 42 42 0 -1 4194304 100 0 0 0 17 25 3 4 20 0 5 0 900";
        assert_eq!(cpu_ticks(stat), Some(42));
        assert_eq!(cpu_ticks("42 (luna) S 1"), None);
    }

    #[test]
    fn resident_memory_is_in_bytes() {
        let status = "Name:\tluna\nVmHWM:\t    9999 kB\nVmRSS:\t    2048 kB\n";
        assert_eq!(resident(status), Some(2 << 20));
        assert_eq!(resident("Name:\tluna\n"), None);
    }

    #[test]
    fn the_kernel_knows_this_process() {
        let pid = std::process::id();
        assert!(resident_bytes(pid).unwrap() > 0);
        cpu_time(pid).unwrap();
    }
}
