//! Messages as people read them in a trace.

use bytes::Bytes;
use protocol::{
    Envelope, ErrorReply, Header,
    worker::{Alive, CancelWork, Done, Ready, Work},
};

/// The request that a message is about, and the message in a few words.
pub(crate) fn describe(frames: &[Bytes]) -> (Option<String>, String) {
    let Ok(envelope) = Envelope::open(frames.to_vec()) else {
        return (None, "garbage".to_owned());
    };
    let kind = envelope.peek.kind.clone();
    let inner = envelope.attachments.first().and_then(|header| protocol::header::peek(header).ok());
    let inner_id = inner.as_ref().and_then(|peek| peek.id.as_ref()).map(ToString::to_string);
    match kind.as_str() {
        Work::KIND => {
            let words = envelope.read::<Work>().map(|work| {
                let Work { dispatch, attempt, budget_ms, .. } = work;
                format!("work {dispatch:x}, attempt {attempt}, {budget_ms} ms left")
            });
            (inner_id, words.unwrap_or(kind))
        }
        Done::KIND => {
            let words = envelope.read::<Done>().map(|done| {
                let failed = done.failed.map(|code| format!(", {code}")).unwrap_or_default();
                format!("done {:x}{failed}", done.dispatch)
            });
            (inner_id, words.unwrap_or(kind))
        }
        CancelWork::KIND => {
            let words =
                envelope.read::<CancelWork>().map(|c| format!("cancel_work {:x}", c.dispatch));
            (None, words.unwrap_or(kind))
        }
        Ready::KIND => {
            let words = envelope.read::<Ready>().map(|ready| {
                format!("ready, epoch {:x}, holds {:x?}", ready.epoch, ready.in_flight)
            });
            (None, words.unwrap_or(kind))
        }
        Alive::KIND => {
            let words = envelope.read::<Alive>().map(|alive| {
                format!("alive, revision {}, holds {:x?}", alive.revision, alive.in_flight)
            });
            (None, words.unwrap_or(kind))
        }
        ErrorReply::KIND => {
            let id = envelope.peek.id.as_ref().map(ToString::to_string);
            let words = envelope.read::<ErrorReply>().map(|e| format!("{}: {}", e.code, e.message));
            (id, words.unwrap_or(kind))
        }
        _ => {
            let id = envelope.peek.id.as_ref().map(ToString::to_string);
            let words = id.as_ref().map_or_else(|| kind.clone(), |id| format!("{kind} {id}"));
            (id, words)
        }
    }
}
