//! A client's process: the real request table, asking for encodes and checking every answer.
//!
//! This is the one file of the simulator that knows how a client core is driven; it does what
//! `client-sdk/src/driver.rs` does.

use std::collections::BTreeMap;

use bytes::Bytes;
use client_core::{Action, Ask, Outcome, Start, Table};
use protocol::{
    Envelope, ErrorCode, ErrorReply, ExecutionMode, RequestId, frames, header,
    reply::ClipEncodeReply,
    request::{
        ClipEncode, EncodeOptions, EvictLora, HasLora, Heartbeat, ListModels, Prompt, StackEntry,
        Warm,
    },
};

use crate::{
    catalog::{Catalog, answer},
    dealer::Dealer,
    env::Env,
    event::{Connection, Inside, Node},
    ledger::{Ending, Entry},
    mutant::Mutant,
    time::{Clock, Span, Time},
    upload::{Step, Upload},
};

const HEARTBEAT: Span = Span::from_millis(500);

/// As the SDK has it.
const CONNECT_TIMEOUT: Span = Span::from_secs(3);

/// Time after the last fault in which new requests still come.
const TRAFFIC_AFTER_FAULTS: Span = Span::from_secs(5);

/// Prompts that begin so kill the process that runs them.
const POISON: &str = "poison";

/// A client, dead or alive.
#[derive(Debug)]
pub(crate) struct ClientProcess {
    index: usize,
    pub(crate) life: u32,
    /// Since when its process could act.
    pub(crate) awake: Time,
    /// Adapters that it has to upload, and what is left of it.
    pub(crate) uploads: Vec<usize>,
    running: Option<Running>,
}

/// A client that lives.
#[derive(Debug)]
struct Running {
    owner: (Node, u32),
    clock: Clock,
    armed: Option<Time>,
    dealer: Dealer,
    table: Table,
    asked: u64,
    /// Encodes that await their answer, with the answer.
    open: BTreeMap<RequestId, u64>,
    upload: Option<Upload>,
    /// For [`Mutant::NoResend`]: whether everything now sent was sent before.
    is_resending: bool,
}

/// Whether a request kills the process that runs it.
pub(crate) fn is_poison(request: &ClipEncode) -> bool {
    request.prompts[0].text.as_deref().is_some_and(|text| text.starts_with(POISON))
}

impl ClientProcess {
    /// A client that does not run yet and has these adapters to upload.
    pub(crate) fn new(index: usize, uploads: Vec<usize>) -> Self {
        Self { index, life: 0, awake: Time::ZERO, uploads, running: None }
    }

    /// Whether the process runs.
    pub(crate) fn is_alive(&self) -> bool {
        self.running.is_some()
    }

    /// Starts the process.
    pub(crate) fn start(&mut self, env: &mut Env) {
        self.life += 1;
        let owner = (Node::Client(self.index), self.life);
        let clock = env.clock();
        env.later(HEARTBEAT, owner, Inside::Heartbeat);
        let first = env.random.exponential(env.plan.pause);
        env.later(first, owner, Inside::Ask);
        let upload = env.random.span(Span::ZERO, Span::from_secs(4));
        env.later(upload, owner, Inside::Upload);
        self.running = Some(Running {
            owner,
            clock,
            armed: None,
            dealer: Dealer::new(owner, env),
            table: Table::new(CONNECT_TIMEOUT.duration()),
            asked: 0,
            open: BTreeMap::new(),
            upload: None,
            is_resending: false,
        });
    }

    /// Kills the process. Returns the connection that it had.
    pub(crate) fn kill(&mut self, env: &mut Env) -> Option<Connection> {
        self.life += 1;
        env.ledger.client_died(self.index);
        self.running.take()?.dealer.connection()
    }

    /// The connection in use.
    pub(crate) fn connection(&self) -> Option<Connection> {
        self.running.as_ref()?.dealer.connection()
    }

    /// A message of the broker came.
    pub(crate) fn message(&mut self, connection: Connection, frames: Vec<Bytes>, env: &mut Env) {
        let Some(running) = &mut self.running else { return };
        if running.dealer.connection() != Some(connection) {
            return;
        }
        running.dealer.heard(env);
        if let Ok(envelope) = Envelope::open(frames) {
            running.check_owner(&envelope, env);
            let now = running.clock.show(env.now);
            running.table.handle_message(envelope, now);
        }
        self.settle(env);
    }

    /// A connection was closed.
    pub(crate) fn gone(&mut self, connection: Connection, env: &mut Env) {
        let Some(running) = &mut self.running else { return };
        if running.dealer.lost(connection, env) {
            running.table.handle_disconnected();
        }
        self.settle(env);
    }

    /// Something happened inside.
    pub(crate) fn inside(&mut self, what: &Inside, env: &mut Env) {
        let Some(running) = &mut self.running else { return };
        let now = running.clock.show(env.now);
        match what {
            Inside::Connect => running.dealer.connect(env),
            Inside::Connected => {
                if running.dealer.connected(env) {
                    running.is_resending = true;
                    running.table.handle_connected(now);
                }
            }
            Inside::Liveness => {
                if running.dealer.check_liveness(env) {
                    running.table.handle_disconnected();
                }
            }
            Inside::Heartbeat => {
                running.dealer.send(frames::frames(&Heartbeat {}, Vec::new()), env);
                env.later(HEARTBEAT, running.owner, Inside::Heartbeat);
            }
            Inside::Timeout => {
                running.armed = None;
                running.table.handle_timeout(now);
            }
            Inside::Ask => {
                running.ask(env);
                let pause = env.random.exponential(env.plan.pause);
                if env.now < env.ledger.calm_since + TRAFFIC_AFTER_FAULTS {
                    env.later(pause, running.owner, Inside::Ask);
                }
            }
            Inside::Upload => running.upload(&self.uploads, env),
            Inside::Stored
            | Inside::Terminate
            | Inside::Leave
            | Inside::Executed(_)
            | Inside::Crashed(_)
            | Inside::Verified(_)
            | Inside::DiskRead(_)
            | Inside::ModelLoaded(_) => {}
        }
        self.settle(env);
    }

    /// Performs what the table wants, and plans when it is woken next.
    fn settle(&mut self, env: &mut Env) {
        let Some(running) = &mut self.running else { return };
        while let Some(action) = running.table.poll_action() {
            match action {
                Action::Send { request, frames } => running.send(request.as_ref(), frames, env),
                Action::Finish { id, outcome } => {
                    if let Some(uploaded) = running.finish(&id, outcome, self.awake, env) {
                        self.uploads.retain(|adapter| *adapter != uploaded);
                    }
                }
            }
        }
        running.is_resending = false;
        let Some(wake) = running.table.poll_timeout() else { return };
        let wake = running.clock.when(wake).max(env.now);
        if running.armed.is_none_or(|armed| wake < armed) {
            running.armed = Some(wake);
            env.later(wake.since(env.now), running.owner, Inside::Timeout);
        }
    }
}

impl Running {
    /// I9: nobody gets an answer that is meant for another.
    fn check_owner(&self, envelope: &Envelope, env: &mut Env) {
        let Some(id) = &envelope.peek.id else { return };
        let (Node::Client(index), life) = self.owner else { return };
        if !id.as_str().starts_with(&format!("c{index}-{life}-")) {
            let what = format!("client {index} of life {life} got another's answer");
            env.ledger.violate("I9", Some(id), what, env.now);
        }
    }

    fn send(&mut self, request: Option<&RequestId>, frames: Vec<Bytes>, env: &mut Env) {
        if env.mutant == Some(Mutant::NoResend) && self.is_resending {
            return;
        }
        // A request that comes twice is allowed: an id that is pending is not accepted again.
        let is_encode = request.is_some_and(|id| self.open.contains_key(id));
        if is_encode && env.random.chance(env.plan.duplicates) {
            self.dealer.send(frames.clone(), env);
        }
        self.dealer.send(frames, env);
    }

    fn next_id(&mut self) -> RequestId {
        self.asked += 1;
        let (Node::Client(index), life) = self.owner else { unreachable!("a client's own name") };
        format!("c{index}-{life}-{}", self.asked).parse().expect("letters, digits and hyphens")
    }

    /// The next thing that its user wants.
    fn ask(&mut self, env: &mut Env) {
        if env.random.chance(0.02) {
            return self.ask_aside(env);
        }
        if env.random.chance(0.01)
            && let Some(id) = self.open.keys().next().cloned()
        {
            self.open.remove(&id);
            env.ledger.cancelled(&id);
            let cancel = self.next_id();
            return self.table.cancel(&id, cancel);
        }
        // Now and then comes a burst, such as all ranges of a schedule.
        let count = if env.random.chance(0.05) { env.random.between(2, 12) } else { 1 };
        for _ in 0..count {
            if self.open.len() < env.plan.open_max {
                self.encode(env);
            }
        }
    }

    /// Something other than an encode; the table sees to it that it ends.
    fn ask_aside(&mut self, env: &mut Env) {
        let id = self.next_id();
        let adapters = vec![Catalog::get().adapters[env.random.below(env.plan.adapters)].id];
        let budget_ms = env.random.chance(0.5).then_some(2_000);
        let header = match env.random.below(6) {
            0 => header::write(&HasLora { id: id.clone(), adapters }),
            1 => header::write(&EvictLora { id: id.clone(), adapters, delete: false }),
            2 => header::write(&ListModels { id: id.clone() }),
            _ => header::write(&Warm {
                id: id.clone(),
                adapters,
                model: None,
                workers: u32::try_from(env.random.between(1, 3)).unwrap_or(1),
                budget_ms,
            }),
        };
        let ask = Ask::Plain(header.into(), Vec::new());
        let timeout = Span::from_secs(5).duration();
        self.table.start(Start { id, ask, timeout }, self.clock.show(env.now));
    }

    fn encode(&mut self, env: &mut Env) {
        let id = self.next_id();
        let catalog = Catalog::get();
        let is_poison =
            env.random.chance(env.plan.poison) && env.now + Span::from_secs(3) < env.plan.calm;
        let model = &catalog.models[usize::from(env.random.chance(0.2))];
        let count = env.random.below(4);
        let stack: Vec<_> = (0..count)
            .map(|_| StackEntry {
                adapter: catalog.adapters
                    [env.ledger.known[env.random.zipf(env.ledger.known.len())]]
                .id,
                strength_patch: *env.random.pick(&[1.0, 0.8, 0.5, -0.3]),
                strength_model: *env.random.pick(&[1.0, 1.0, 0.9]),
            })
            .collect();
        let prompt =
            if is_poison { POISON.to_owned() } else { format!("a cat {}", env.random.below(100)) };
        let expected =
            answer(&model.digest, &prompt, stack.iter().map(|entry| (entry, entry.adapter)));
        let is_hasty = env.random.chance(0.05);
        let timeout = if is_hasty {
            env.random.log_span(Span::from_millis(5), Span::from_millis(500))
        } else {
            env.random.log_span(Span::from_secs(3), Span::from_secs(30))
        };
        let request = ClipEncode {
            id: id.clone(),
            model: model.name.clone(),
            model_digest: env.random.chance(0.3).then_some(model.digest),
            prompts: vec![Prompt { text: Some(prompt), ..Prompt::default() }],
            stack,
            options: EncodeOptions {
                mode: env.random.chance(0.1).then_some(ExecutionMode::Locking),
                ..EncodeOptions::default()
            },
            budget_ms: None,
            no_cache: env.random.chance(0.1),
            requires: Vec::new(),
        };
        let Node::Client(client) = self.owner.0 else { return };
        let deadline = env.now + timeout;
        env.ledger.asked(id.clone(), Entry { client, deadline, is_poison, is_hasty });
        self.open.insert(id.clone(), expected);
        let node = self.owner.0;
        env.trace.note(env.now, [10, node.number(), self.asked], || {
            (Some(id.to_string()), format!("{node}: asks {id}, {timeout} to answer"))
        });
        let ask = Ask::Encode(Box::new(request), Vec::new());
        let timeout = timeout.duration();
        self.table.start(Start { id, ask, timeout }, self.clock.show(env.now));
    }

    /// Takes in how a request ended. Returns the adapter whose upload that completes.
    fn finish(
        &mut self,
        id: &RequestId,
        outcome: Outcome,
        awake: Time,
        env: &mut Env,
    ) -> Option<usize> {
        let Some(expected) = self.open.remove(id) else {
            return self.finish_upload(id, &outcome, env);
        };
        let ending = match outcome {
            Outcome::Reply(envelope) if envelope.is::<ErrorReply>() => {
                let code = envelope.read::<ErrorReply>().map(|reply| reply.code);
                Ending::Failed(code.unwrap_or(ErrorCode::Internal))
            }
            Outcome::Reply(envelope) => {
                if let Err(what) = check(&envelope, expected) {
                    env.ledger.violate("I2", Some(id), what, env.now);
                }
                Ending::Answered
            }
            Outcome::TimedOut => Ending::TimedOut,
            Outcome::Unreachable => Ending::Unreachable,
            Outcome::Connected | Outcome::Full | Outcome::TooLarge => {
                let what = format!("an encode ended with {outcome:?}");
                env.ledger.violate("I1", Some(id), what, env.now);
                Ending::TimedOut
            }
        };
        let node = self.owner.0;
        env.trace.note(env.now, [11, node.number(), 0], || {
            (Some(id.to_string()), format!("{node}: {id} ended: {ending:?}"))
        });
        env.ledger.ended(id, ending, awake, env.now);
        None
    }

    /// Begins the upload of the next adapter, or goes on with it.
    fn upload(&mut self, left: &[usize], env: &mut Env) {
        let Some(&adapter) = left.first() else { return };
        if self.upload.is_none() {
            let id = self.next_id();
            let (upload, start) = Upload::begin(adapter, id);
            self.upload = Some(upload);
            self.table.start(start, self.clock.show(env.now));
        }
    }

    fn finish_upload(&mut self, id: &RequestId, outcome: &Outcome, env: &mut Env) -> Option<usize> {
        let upload = self.upload.as_mut().filter(|upload| upload.awaits(id))?;
        let adapter = upload.adapter;
        let reply = match outcome {
            Outcome::Reply(envelope) => envelope.read().ok(),
            Outcome::Connected
            | Outcome::TimedOut
            | Outcome::Unreachable
            | Outcome::Full
            | Outcome::TooLarge => None,
        };
        match upload.next(reply) {
            Step::Ask(make) => {
                let id = self.next_id();
                let start = self.upload.as_mut().expect("it is under way").ask(make, id);
                self.table.start(start, self.clock.show(env.now));
                return None;
            }
            Step::Again => {
                let pause = env.random.span(Span::from_millis(50), Span::from_millis(500));
                env.later(pause, self.owner, Inside::Upload);
                self.upload = None;
                return None;
            }
            Step::Done(found) => {
                if found != Catalog::get().adapters[adapter].id {
                    env.ledger.violate("I2", Some(id), "an upload became another adapter", env.now);
                }
            }
        }
        self.upload = None;
        env.ledger.uploaded(adapter);
        env.later(Span::from_millis(1), self.owner, Inside::Upload);
        Some(adapter)
    }
}

/// Checks an answer against what was asked for, as the SDK does, and its value beyond that.
fn check(envelope: &Envelope, expected: u64) -> Result<(), String> {
    let reply: ClipEncodeReply = envelope.read().map_err(|error| error.to_string())?;
    let cond = reply.results.first().ok_or("no result")?.cond.bytes(&envelope.attachments);
    let value = cond.map_err(|error| error.to_string())?;
    if **value != expected.to_le_bytes() {
        let stack: Vec<_> = reply.receipt.stack.iter().map(|entry| entry.adapter.short()).collect();
        return Err(format!("the answer is another request's: the receipt says {stack:?}"));
    }
    Ok(())
}
