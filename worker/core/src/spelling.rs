//! Commands as short sentences, for tests.

use protocol::AdapterId;

use crate::command::{Command, Place};

/// The command in words; its adapter is one of those called `names`.
pub(crate) fn spell(command: &Command, names: &[&str]) -> String {
    let name = |adapter: &AdapterId| {
        let is_it = |name: &&&str| AdapterId::of(name.as_bytes()) == *adapter;
        *names.iter().find(is_it).expect("the test knows the adapter")
    };
    match command {
        Command::Fetch(adapter) => format!("fetch {}", name(adapter)),
        Command::Prefetch(adapter) => format!("prefetch {}", name(adapter)),
        Command::StopFetch(adapter) => format!("stop {}", name(adapter)),
        Command::ReadDisk(adapter) => format!("read {}", name(adapter)),
        Command::WriteDisk(adapter) => format!("write {}", name(adapter)),
        Command::Promote(adapter) => format!("promote {}", name(adapter)),
        Command::Demote(adapter) => format!("demote {}", name(adapter)),
        Command::Forget(adapter, Place::Memory) => format!("forget {}", name(adapter)),
        Command::Forget(adapter, Place::Disk) => format!("forget {} on disk", name(adapter)),
        Command::LoadModel(model) => format!("load {model}"),
        Command::UnloadModel(model) => format!("unload {model}"),
        Command::Run(run) => format!("run {}", run.dispatch.0),
        Command::Interrupt(dispatch) => format!("interrupt {}", dispatch.0),
        Command::Fail(dispatch, failure) => format!("fail {} {}", dispatch.0, failure.code),
    }
}
