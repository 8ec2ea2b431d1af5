//! Whatever is written reads back the same, for every kind.

use std::fmt::Debug;

use bytes::Bytes;
use luna_protocol::{Envelope, Header, frames, header, request, worker};
use proptest::{prelude::*, test_runner::TestCaseResult};

use crate::strategies;

macro_rules! every_header_survives {
    ($($kind:ident)+) => {
        proptest! {
            $(#[test]
            fn $kind(header in strategies::$kind()) {
                survives(&header)?;
            })+
        }
    };
}

every_header_survives! {
    clip_encode has_lora upload_lora list_loras evict_lora list_models register_model status explain
    warm drain warm_reply drain_reply prefetch drain_worker
    cancel     clip_encode_reply has_lora_reply upload_lora_reply list_loras_reply evict_lora_reply
    list_models_reply register_model_reply status_reply explain_reply cancel_reply error
    ready alive done fetch registered disconnect
    work cancel_work blob no_blob evict register
}

#[test]
fn headers_without_fields_survive() {
    survives(&request::Heartbeat {}).unwrap();
    survives(&worker::Announce {}).unwrap();
    survives(&worker::Released {}).unwrap();
}

proptest! {
    #[test]
    fn attachments_and_the_delimiter_survive(
        parts in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..20), 0..8),
        delimited: bool,
    ) {
        let attachments: Vec<_> = parts.into_iter().map(Bytes::from).collect();
        let sent = frames::frames(&request::Heartbeat {}, attachments.clone());
        let envelope = Envelope::open(frames::delimit(sent, delimited)).unwrap();
        prop_assert_eq!(envelope.delimited, delimited);
        prop_assert_eq!(envelope.attachments, attachments);
    }
}

fn survives<H: Header + PartialEq + Debug>(value: &H) -> TestCaseResult {
    let envelope = Envelope::open(frames::frames(value, Vec::new()))
        .map_err(|error| TestCaseError::fail(error.to_string()))?;
    prop_assert!(envelope.is::<H>());
    let read: H = envelope.read().map_err(|error| TestCaseError::fail(error.to_string()))?;
    prop_assert_eq!(&read, value);
    prop_assert_eq!(header::write(&read), header::write(value));
    Ok(())
}
