//! A farm of one thread that answers from a script: a ROUTER and nothing behind it.

use std::{
    sync::{Arc, Mutex, mpsc},
    thread::JoinHandle,
};

use bytes::Bytes;
use luna_client::Client;
use protocol::{
    AdapterReceipt, AdapterSource, Dtype, Envelope, ExecutionMode, Fidelity, Header, ModelDigest,
    Receipt, RequestId, TensorRef, Times, frames,
    reply::{ClipEncodeReply, ConditioningRef},
    request::{ClipEncode, Heartbeat},
    tensor,
};
use tokio::sync::oneshot;
use transport::{Message, Peer, Router, RouterConfig, RouterEvent};

/// A farm that runs until it is dropped; its socket closes with it.
pub(crate) struct Farm {
    endpoint: String,
    /// What came, and on which connection.
    seen: Arc<Mutex<Vec<(Peer, Envelope)>>>,
    arrivals: mpsc::Receiver<()>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
    /// Holds the socket's file, and goes with the farm.
    directory: Option<tempfile::TempDir>,
}

impl Farm {
    /// A farm at an address of its own. `script` answers every message but heartbeats.
    pub(crate) fn start(script: impl FnMut(&Envelope) -> Vec<Vec<Bytes>> + Send + 'static) -> Self {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let endpoint = format!("ipc://{}", directory.path().join("farm.sock").display());
        let mut farm = Self::start_at(&endpoint, script);
        farm.directory = Some(directory);
        farm
    }

    /// A farm at `endpoint`, where another may have been.
    pub(crate) fn start_at(
        endpoint: &str,
        mut script: impl FnMut(&Envelope) -> Vec<Vec<Bytes>> + Send + 'static,
    ) -> Self {
        let address = endpoint.parse().expect("an endpoint");
        let mut router = Router::bind(&address, RouterConfig::default()).expect("a free address");
        let (stop, mut stopped) = oneshot::channel();
        let (arrived, arrivals) = mpsc::channel();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let log = Arc::clone(&seen);
        let thread = std::thread::spawn(move || {
            bare_runtime().block_on(async {
                loop {
                    let event = tokio::select! {
                        _ = &mut stopped => break,
                        event = router.recv() => event.expect("the socket's thread lives"),
                    };
                    let RouterEvent::Message { peer, message } = event else { continue };
                    let envelope = Envelope::open(message.into_frames()).expect("a message");
                    let replies = if envelope.is::<Heartbeat>() {
                        vec![frames::frames(&Heartbeat {}, Vec::new())]
                    } else {
                        let replies = script(&envelope);
                        log.lock().expect("no test panics with it").push((peer.clone(), envelope));
                        // The test may have stopped listening.
                        let _ = arrived.send(());
                        replies
                    };
                    for reply in replies {
                        let message = Message::new(reply).expect("frames");
                        // A client that left gets no answer.
                        let _ = router.send(&peer, message);
                    }
                }
                router.close().await;
            });
        });
        Self {
            endpoint: endpoint.to_owned(),
            seen,
            arrivals,
            stop: Some(stop),
            thread: Some(thread),
            directory: None,
        }
    }

    pub(crate) fn endpoint(&self) -> &str {
        &self.endpoint
    }

    pub(crate) fn client(&self) -> Client {
        Client::builder().endpoint(self.endpoint()).build().expect("a client")
    }

    /// Waits until one more message arrived.
    pub(crate) fn wait(&self) {
        self.arrivals.recv().expect("the farm lives");
    }

    /// What came so far, heartbeats left out.
    pub(crate) fn seen(&self) -> Vec<Envelope> {
        let seen = self.seen.lock().expect("no test panics with it");
        seen.iter().map(|(_, envelope)| envelope.clone()).collect()
    }

    /// The connections on which the messages of one kind came so far.
    pub(crate) fn senders_of<H: Header>(&self) -> Vec<Peer> {
        let seen = self.seen.lock().expect("no test panics with it");
        let of_kind = seen.iter().filter(|(_, envelope)| envelope.is::<H>());
        of_kind.map(|(peer, _)| peer.clone()).collect()
    }

    /// The headers of one kind that came so far.
    pub(crate) fn seen_of<H: Header>(&self) -> Vec<H> {
        let seen = self.seen();
        let of_kind = seen.iter().filter(|envelope| envelope.is::<H>());
        of_kind.map(|envelope| envelope.read().expect("its fields")).collect()
    }
}

impl Drop for Farm {
    fn drop(&mut self) {
        // The thread may have panicked, which its join tells.
        let _ = self.stop.take().expect("set until now").send(());
        let ended = self.thread.take().expect("set until now").join();
        assert!(ended.is_ok() || std::thread::panicking(), "the farm panicked");
    }
}

/// Runs a future where there is neither a timer nor I/O, which the client must not need.
pub(crate) fn run<F: Future>(future: F) -> F::Output {
    bare_runtime().block_on(future)
}

fn bare_runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().build().expect("a runtime")
}

/// One message without attachments.
pub(crate) fn one<H: Header>(header: &H) -> Vec<Vec<Bytes>> {
    vec![frames::frames(header, Vec::new())]
}

/// A right answer to an encode: 77 positions, 4 wide, for every prompt.
pub(crate) fn answer(envelope: &Envelope) -> Vec<Vec<Bytes>> {
    let (reply, attachments) = right_reply(envelope);
    vec![frames::frames(&reply, attachments)]
}

pub(crate) fn right_reply(envelope: &Envelope) -> (ClipEncodeReply, Vec<Bytes>) {
    let request: ClipEncode = envelope.read().expect("an encode");
    let tensor = |shape: &[u32], attachment| TensorRef {
        dtype: Dtype::Float32,
        shape: shape.to_vec(),
        attachment,
    };
    let result =
        ConditioningRef { cond: tensor(&[1, 77, 4], 0), pooled: tensor(&[1, 4], 1), tokens: None };
    let results = vec![result; request.prompts.len()];
    let cond = tensor::f32_to_bytes(&[0.5; 77 * 4]);
    let pooled = tensor::f32_to_bytes(&[1.0, 2.0, 3.0, 4.0]);
    let receipt = receipt(&request);
    (ClipEncodeReply { id: request.id, results, receipt }, vec![cond, pooled])
}

fn receipt(request: &ClipEncode) -> Receipt {
    let stack = request.stack.iter().map(|entry| AdapterReceipt {
        adapter: entry.adapter,
        strength_patch: entry.strength_patch,
        strength_model: entry.strength_model,
        applied: 72,
        not_matched: Vec::new(),
        failed: Vec::new(),
        source: AdapterSource::Resident,
    });
    Receipt {
        model: request.model.clone(),
        model_digest: ModelDigest::of(b"model"),
        weights_dtype: Dtype::Float16,
        stack: stack.collect(),
        hook_stacks: Vec::new(),
        mode: ExecutionMode::Functional,
        fidelity: Fidelity::Comfyui,
        merged_weights: None,
        worker: "gpu-0".parse().expect("a name"),
        attempts: 1,
        times: Times::default(),
        cache: None,
        warnings: Vec::new(),
    }
}

pub(crate) fn id(envelope: &Envelope) -> RequestId {
    envelope.peek.id.clone().expect("requests have ids")
}
