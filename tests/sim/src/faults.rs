//! The faults of a run: drawn before it begins, so that the traffic cannot change them.

use crate::{
    event::{End, Node},
    random::Random,
    time::{Span, Time},
};

/// A kind of fault. A seed has some of them or none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Class {
    /// `kill -9` of a worker, and its restart.
    WorkerKill,
    /// `kill -9` of the broker, and its restart.
    BrokerKill,
    /// `kill -9` of a client, and its restart.
    ClientKill,
    /// `SIGSTOP` and `SIGCONT` of any process.
    Pause,
    /// A host that loses power: its connections do not even close.
    HostLoss,
    /// A worker or a client without a network, in both directions or in one.
    Partition,
    /// The broker without a network.
    BrokerPartition,
    /// Connections that are reset with everything that is under way.
    Reset,
    /// Delays up to 400 ms.
    SlowLink,
    /// A disk that is slow.
    SlowDisk,
    /// A disk without room.
    FullDisk,
    /// Several processes lose the network one by one, and get it back in another order.
    Swizzle,
    /// `SIGTERM` of one worker after the other, each of which comes back after it has left.
    Drain,
    /// Requests that kill the worker that runs them; clients send them.
    Poison,
}

/// A change of the world.
#[derive(Debug, Clone)]
pub(crate) enum Action {
    Kill(Node),
    /// A worker is told to stop; it is started again after it has left.
    Terminate(usize),
    Start(Node),
    Pause(Node),
    Resume(Node),
    /// What comes from these ends of the link of a worker or client does not arrive.
    Block(Node, Vec<End>),
    Unblock(Node, Vec<End>),
    Reset(Node),
    SlowLink(Node, Span),
    SlowDisk(bool),
    FullDisk(bool),
}

impl Action {
    /// Whether a worker may lose what it has in hand by this.
    pub(crate) const fn can_lose_work(&self) -> bool {
        match self {
            Self::Kill(node)
            | Self::Pause(node)
            | Self::Resume(node)
            | Self::Block(node, _)
            | Self::Unblock(node, _)
            | Self::Reset(node)
            | Self::SlowLink(node, _) => !matches!(node, Node::Client(_)),
            Self::Start(_) | Self::Terminate(_) | Self::SlowDisk(_) | Self::FullDisk(_) => false,
        }
    }
}

/// A change and its moment.
#[derive(Debug, Clone)]
pub(crate) struct Planned {
    pub(crate) at: Time,
    pub(crate) action: Action,
}

/// Time between two planned stops.
const DRAIN_PAUSE: Span = Span::from_millis(2500);

/// Draws one fault after the other.
struct Planner<'a> {
    random: &'a mut Random,
    nodes: (usize, usize),
    planned: Vec<Planned>,
    end: Time,
    /// When the next worker may be told to stop.
    next_drain: Time,
}

impl Class {
    const ALL: [Self; 14] = [
        Self::WorkerKill,
        Self::BrokerKill,
        Self::ClientKill,
        Self::Pause,
        Self::HostLoss,
        Self::Partition,
        Self::BrokerPartition,
        Self::Reset,
        Self::SlowLink,
        Self::SlowDisk,
        Self::FullDisk,
        Self::Swizzle,
        Self::Drain,
        Self::Poison,
    ];

    /// Whether workers are back at once, so that the farm must go on as if nothing had happened.
    pub(crate) const fn is_mild(self) -> bool {
        matches!(
            self,
            Self::BrokerKill | Self::ClientKill | Self::Reset | Self::SlowDisk | Self::FullDisk
        )
    }

    /// The kinds of one run: one alone in a third of all runs, else a mixture, rarely none.
    pub(crate) fn draw(random: &mut Random) -> Vec<Self> {
        match random.below(12) {
            0 => Vec::new(),
            1..=4 => vec![*random.pick(&Self::ALL)],
            5 => Self::ALL.to_vec(),
            _ => {
                let mut classes = Self::ALL.to_vec();
                classes.retain(|_| random.chance(0.35));
                classes
            }
        }
    }
}

/// The faults of a run with these kinds; all have ended after `storm`.
pub(crate) fn plan(
    classes: &[Class],
    nodes: (usize, usize),
    storm: Span,
    random: &mut Random,
) -> Vec<Planned> {
    if classes.is_empty() {
        return Vec::new();
    }
    let mean = random.log_span(Span::from_millis(150), Span::from_secs(2));
    let end = Time::ZERO + storm;
    let mut planner = Planner { random, nodes, planned: Vec::new(), end, next_drain: Time::ZERO };
    let mut at = Time::ZERO + Span::from_millis(300);
    loop {
        at = at + planner.random.exponential(mean);
        if at >= end {
            break;
        }
        let class = *planner.random.pick(classes);
        planner.fault(class, at);
    }
    planner.planned
}

impl Planner<'_> {
    fn fault(&mut self, class: Class, at: Time) {
        match class {
            Class::WorkerKill => {
                let node = self.worker();
                self.kill(node, at, (Span::from_millis(50), Span::from_secs(2)));
            }
            Class::BrokerKill => {
                self.kill(Node::Broker, at, (Span::from_millis(50), Span::from_secs(1)));
            }
            Class::ClientKill => {
                let node = self.client();
                self.kill(node, at, (Span::from_millis(50), Span::from_secs(2)));
            }
            Class::Pause => {
                let node = self.anybody();
                let length = self.length(Span::from_millis(20), Span::from_secs(4));
                self.pair(at, length, Action::Pause(node), Action::Resume(node));
            }
            Class::HostLoss => {
                let node = self.worker_or_client();
                let length = self.length(Span::from_millis(500), Span::from_secs(5));
                let ends = vec![End::Dealer, End::Router];
                self.pair(
                    at,
                    length,
                    Action::Block(node, ends.clone()),
                    Action::Unblock(node, ends),
                );
                let (down, up) =
                    (at + Span::from_micros(1), Span::from_micros(length.micros() - 2));
                self.pair(down, up, Action::Kill(node), Action::Start(node));
            }
            Class::Partition => {
                let node = self.worker_or_client();
                let length = self.length(Span::from_millis(20), Span::from_secs(5));
                let ends = self.ends();
                self.partition(node, ends, at, length);
            }
            Class::BrokerPartition => {
                let length = self.length(Span::from_millis(20), Span::from_secs(4));
                let ends = self.ends();
                for node in self.everybody() {
                    self.partition(node, ends.clone(), at, length);
                }
            }
            Class::Reset => {
                let node = self.worker_or_client();
                self.planned.push(Planned { at, action: Action::Reset(node) });
            }
            Class::SlowLink => {
                let node = self.worker_or_client();
                let length = self.length(Span::from_millis(200), Span::from_secs(4));
                let extra = self.length(Span::from_millis(5), Span::from_millis(400));
                let (slow, normal) =
                    (Action::SlowLink(node, extra), Action::SlowLink(node, Span::ZERO));
                self.pair(at, length, slow, normal);
            }
            Class::SlowDisk => {
                let length = self.length(Span::from_millis(200), Span::from_secs(4));
                self.pair(at, length, Action::SlowDisk(true), Action::SlowDisk(false));
            }
            Class::FullDisk => {
                let length = self.length(Span::from_millis(200), Span::from_secs(4));
                self.pair(at, length, Action::FullDisk(true), Action::FullDisk(false));
            }
            Class::Swizzle => self.swizzle(at),
            Class::Drain => self.drain(at),
            Class::Poison => {}
        }
    }

    /// One at a time, as whoever restarts a farm does.
    fn drain(&mut self, at: Time) {
        if at >= self.next_drain {
            self.next_drain = at + DRAIN_PAUSE;
            let worker = self.random.below(self.nodes.0);
            self.planned.push(Planned { at, action: Action::Terminate(worker) });
        }
    }

    fn kill(&mut self, node: Node, at: Time, (first, last): (Span, Span)) {
        let length = self.length(first, last);
        self.pair(at, length, Action::Kill(node), Action::Start(node));
    }

    fn partition(&mut self, node: Node, ends: Vec<End>, at: Time, length: Span) {
        self.pair(at, length, Action::Block(node, ends.clone()), Action::Unblock(node, ends));
    }

    fn swizzle(&mut self, at: Time) {
        let mut nodes = self.everybody();
        nodes.retain(|_| self.random.chance(0.5));
        let step = self.length(Span::from_millis(10), Span::from_millis(300));
        let mut times = Vec::new();
        for (index, _) in nodes.iter().enumerate() {
            let blocked = at + step.times(index as u64);
            let healed = at + step.times((nodes.len() + self.random.below(nodes.len())) as u64);
            times.push((blocked, healed.since(blocked)));
        }
        for (node, (blocked, length)) in nodes.into_iter().zip(times) {
            self.partition(node, vec![End::Dealer, End::Router], blocked, length);
        }
    }

    /// A change and its opposite, which comes before the storm is over.
    fn pair(&mut self, at: Time, length: Span, change: Action, back: Action) {
        self.planned.push(Planned { at: at.min(self.end), action: change });
        self.planned.push(Planned { at: (at + length).min(self.end), action: back });
    }

    fn length(&mut self, first: Span, last: Span) -> Span {
        self.random.log_span(first, last)
    }

    fn ends(&mut self) -> Vec<End> {
        match self.random.below(3) {
            0 => vec![End::Dealer],
            1 => vec![End::Router],
            _ => vec![End::Dealer, End::Router],
        }
    }

    fn worker(&mut self) -> Node {
        Node::Worker(self.random.below(self.nodes.0))
    }

    fn client(&mut self) -> Node {
        Node::Client(self.random.below(self.nodes.1))
    }

    fn worker_or_client(&mut self) -> Node {
        if self.random.chance(0.6) { self.worker() } else { self.client() }
    }

    fn anybody(&mut self) -> Node {
        if self.random.chance(0.25) { Node::Broker } else { self.worker_or_client() }
    }

    fn everybody(&self) -> Vec<Node> {
        let (workers, clients) = self.nodes;
        (0..workers).map(Node::Worker).chain((0..clients).map(Node::Client)).collect()
    }
}
