//! The number of open files: a connection is one, and systems allow a process 1024 at first.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Raises the number of files that this process may have open to what it may raise it to (the soft
/// limit to the hard one), and returns that number; nothing where there is no limit. Where the
/// system refuses, the limit stays as it was.
///
/// Nothing here uses `select(2)`, for which the soft limit is kept low.
pub fn raise_file_limit() -> Option<u64> {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    let raised = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum });
    if raised.is_ok() { maximum } else { current }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_soft_limit_becomes_the_hard_one() {
        let limit = raise_file_limit();
        assert_eq!(getrlimit(Resource::Nofile).current, limit);
        assert_eq!(raise_file_limit(), limit);
    }
}
