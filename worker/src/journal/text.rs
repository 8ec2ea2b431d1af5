//! The journal's lines: written and read as text, so that people can read them too.

use std::{
    fmt::Write as _,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use protocol::worker::{Busy, Death};

/// The first line.
const MAGIC: &str = "luna journal 1";

/// Bytes of a slot, its newline included.
pub(super) const SLOT_BYTES: usize = "busy ".len() + 64 + " alone\n".len();

/// One request that the worker may be busy with.
#[derive(Debug, Clone, Copy)]
pub(super) enum Slot {
    Busy(Busy),
    Free,
}

/// An earlier process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Ended {
    pub(super) epoch: u64,
    /// When, in seconds of the Unix epoch.
    pub(super) at: u64,
    pub(super) busy_with: Vec<Busy>,
}

impl Slot {
    /// The slot's line, always of the same length.
    pub(super) fn to_bytes(self) -> Vec<u8> {
        match self {
            Self::Busy(busy) => line(busy).into_bytes(),
            Self::Free => {
                let mut blank = vec![b' '; SLOT_BYTES];
                blank[SLOT_BYTES - 1] = b'\n';
                blank
            }
        }
    }
}

impl Ended {
    /// How long ago that was. A clock that was set back makes nothing older.
    pub(super) fn age(&self, now: SystemTime) -> Duration {
        let at = UNIX_EPOCH.checked_add(Duration::from_secs(self.at));
        at.and_then(|at| now.duration_since(at).ok()).unwrap_or_default()
    }

    /// What the broker is told of it.
    pub(super) fn death(&self, now: SystemTime) -> Death {
        let ago_s = u32::try_from(self.age(now).as_secs()).unwrap_or(u32::MAX);
        Death { epoch: self.epoch, ago_s, busy_with: self.busy_with.clone() }
    }
}

/// Everything before the slots of the process with this epoch.
pub(super) fn head(ended: &[Ended], epoch: u64) -> String {
    let mut head = format!("{MAGIC}\n");
    for Ended { epoch, at, busy_with } in ended {
        writeln!(head, "ended {epoch:016x} {at}").expect("a string takes everything");
        head.extend(busy_with.iter().map(|busy| line(*busy)));
    }
    writeln!(head, "process {epoch:016x}").expect("a string takes everything");
    head
}

/// The processes that a journal tells of, with the last one, which ended about `at`. Nothing when
/// this is no journal. A slot that is torn was being written, so that nothing had begun.
pub(super) fn read(bytes: &[u8], at: u64) -> Option<Vec<Ended>> {
    let text = String::from_utf8_lossy(bytes);
    let mut lines = text.split('\n');
    if lines.next() != Some(MAGIC) {
        return None;
    }
    let mut ended: Vec<Ended> = Vec::new();
    let mut is_head = true;
    for line in lines {
        let words: Vec<_> = line.split_ascii_whitespace().collect();
        match (words.as_slice(), ended.last_mut()) {
            (["ended", epoch, at], _) if is_head => {
                let (epoch, at) = (u64::from_str_radix(epoch, 16).ok()?, at.parse().ok()?);
                ended.push(Ended { epoch, at, busy_with: Vec::new() });
            }
            (["process", epoch], _) if is_head => {
                is_head = false;
                let epoch = u64::from_str_radix(epoch, 16).ok()?;
                ended.push(Ended { epoch, at, busy_with: Vec::new() });
            }
            (["busy", key, alone], Some(ended)) => {
                if let Ok(key) = key.parse() {
                    ended.busy_with.push(Busy { key, alone: *alone == "alone" });
                }
            }
            _ if is_head => return None,
            _ => {}
        }
    }
    (!is_head).then_some(ended)
}

fn line(busy: Busy) -> String {
    let Busy { key, alone } = busy;
    format!("busy {key} {}\n", if alone { "alone" } else { "-----" })
}
