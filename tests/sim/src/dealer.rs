//! The connecting end of a worker or client: attempts, back-off and liveness as in `transport`.

use bytes::Bytes;

use crate::{
    env::Env,
    event::{Connection, End, Inside, Node},
    time::{Span, Time},
};

const BACKOFF_MIN: Span = Span::from_millis(10);
const BACKOFF_MAX: Span = Span::from_secs(1);
const CONNECT_TIMEOUT: Span = Span::from_secs(3);
const LIVENESS: Span = Span::from_secs(2);

/// A DEALER socket.
#[derive(Debug)]
pub(crate) struct Dealer {
    owner: (Node, u32),
    connection: Option<Connection>,
    heard: Time,
    /// The largest delay that the next attempt may draw.
    ceiling: Span,
}

impl Dealer {
    /// The socket of a process that has just started; it begins to connect.
    pub(crate) fn new(owner: (Node, u32), env: &mut Env) -> Self {
        let after = env.random.span(Span::ZERO, BACKOFF_MIN);
        env.later(after, owner, Inside::Connect);
        Self { owner, connection: None, heard: env.now, ceiling: BACKOFF_MIN }
    }

    /// Begins an attempt.
    pub(crate) fn connect(&self, env: &mut Env) {
        let handshake = env.network.handshake(self.owner.0);
        env.later(handshake, self.owner, Inside::Connected);
    }

    /// Ends an attempt; says whether a connection stands.
    pub(crate) fn connected(&mut self, env: &mut Env) -> bool {
        let (node, _) = self.owner;
        if env.network.is_blocked(node) {
            // Nobody answers until the attempt times out.
            env.later(CONNECT_TIMEOUT, self.owner, Inside::Connect);
            return false;
        }
        if !env.broker_takes_connections {
            self.retry(env);
            return false;
        }
        self.connection = Some(env.network.connect(node));
        self.heard = env.now;
        env.later(LIVENESS, self.owner, Inside::Liveness);
        true
    }

    /// Something arrived.
    pub(crate) fn heard(&mut self, env: &Env) {
        self.heard = env.now;
        self.ceiling = BACKOFF_MIN;
    }

    /// Gives a silent connection up; says whether it did.
    pub(crate) fn check_liveness(&mut self, env: &mut Env) -> bool {
        let Some(connection) = self.connection else { return false };
        let silence = env.now.since(self.heard);
        if silence < LIVENESS {
            let rest = Span::from_micros(LIVENESS.micros() - silence.micros());
            env.later(rest, self.owner, Inside::Liveness);
            return false;
        }
        env.close(connection, End::Dealer);
        self.lost(connection, env)
    }

    /// The connection is closed; says whether it was the one in use.
    pub(crate) fn lost(&mut self, connection: Connection, env: &mut Env) -> bool {
        if self.connection != Some(connection) {
            return false;
        }
        self.connection = None;
        self.retry(env);
        true
    }

    /// Sends a message, if a connection stands.
    pub(crate) fn send(&self, frames: Vec<Bytes>, env: &mut Env) -> bool {
        let Some(connection) = self.connection else { return false };
        env.send(connection, End::Dealer, frames);
        true
    }

    /// The connection in use.
    pub(crate) fn connection(&self) -> Option<Connection> {
        self.connection
    }

    fn retry(&mut self, env: &mut Env) {
        let after = env.random.span(Span::ZERO, self.ceiling);
        self.ceiling = self.ceiling.times(2).min(BACKOFF_MAX);
        env.later(after, self.owner, Inside::Connect);
    }
}
