//! The broker's knobs, checked once.

use std::time::Duration;

use protocol::limits;

/// Times and limits; the default suits a farm of tens of workers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Silence after which a worker counts as lost.
    pub worker_silence: Duration,
    /// A dispatch that a worker does not list this long after it was sent got lost.
    pub dispatch_lost: Duration,
    /// After the start, how long requests for unknown models wait for the first worker.
    pub startup_grace: Duration,
    /// After the first worker announced itself, how long they wait for the others.
    pub startup_settle: Duration,
    /// Time budget of a request that names none.
    pub budget_default: Duration,
    /// Advice on when to try again, given with `overloaded`.
    pub retry_after: Duration,
    /// Requests that wait for a worker.
    pub queued_max: usize,
    /// Bytes of the messages that wait for a worker.
    pub queued_bytes_max: usize,
    /// Estimated time of the requests that wait, for every worker that serves their model.
    pub queued_time_max: Duration,
    /// Bytes of the answers that are kept for equal requests; 0 keeps none.
    pub answers_bytes_max: usize,
    /// How long an answer is kept.
    pub answers_age_max: Duration,
    /// How long a request that workers died of is remembered.
    pub quarantine: Duration,
    /// Workers that a request may take down before it is given up. The last one has nothing else
    /// in hand, so that what dies with it is what killed it.
    pub losses_max: usize,
    /// Most requests that any worker is given at once, whatever it asks for.
    pub slots_max: usize,
    /// Uploads that one client may have open.
    pub uploads_per_client_max: usize,
    /// Uploads that all clients together may have open.
    pub uploads_max: usize,
    /// Bytes that all open uploads together may announce.
    pub upload_bytes_open_max: u64,
    /// Bytes of one upload.
    pub upload_bytes_max: u64,
    /// Bytes of chunks that all clients together may send ahead of what the store has written;
    /// every open upload may send one chunk beyond that.
    pub upload_bytes_pending_max: usize,
    /// Silence after which an upload is closed, and what came of it kept.
    pub upload_idle: Duration,
    /// Silence after which another client that announces the same file takes an upload over.
    pub upload_silence: Duration,
    /// When a client asks again whose file another is sending.
    pub upload_wait: Duration,
    /// How long what came of an upload is kept for somebody who goes on with it.
    pub upload_kept: Duration,
    /// Uploads of which what came is kept.
    pub parts_max: usize,
    /// Bytes of all stored adapters; the least recently used go first.
    pub store_bytes_max: u64,
    /// Bytes of one uploaded file of a model.
    pub model_bytes_max: u64,
    /// Bytes of all stored files of models, those that are being uploaded included.
    pub model_store_bytes_max: u64,
    /// Models that may be registered.
    pub registrations_max: usize,
    /// Models that workers may be asked to serve at one time.
    pub registrations_open_max: usize,
    /// Clients that may wait for workers to serve a model.
    pub registrations_waiting_max: usize,
    /// When a worker that could not serve a registered model for now is asked again.
    pub registration_retry: Duration,
    /// Commands that the blob store is given at once.
    pub store_commands_max: usize,
    /// Commands to the blob store that clients may have given rise to and that are not done.
    pub store_waiting_max: usize,
    /// Time after which a client no longer waits for the blob store.
    pub store_timeout: Duration,
    /// Workers that fetch an adapter as soon as it is uploaded; 0 for none.
    pub fan_out: usize,
    /// Clients that may wait for adapters to be warm.
    pub warms_waiting_max: usize,
    /// Fetches that one worker may have open.
    pub fetches_per_worker_max: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            worker_silence: Duration::from_secs(2),
            dispatch_lost: Duration::from_millis(600),
            startup_grace: Duration::from_secs(5),
            startup_settle: Duration::from_secs(1),
            budget_default: Duration::from_millis(u64::from(limits::BUDGET_MS_DEFAULT)),
            retry_after: Duration::from_millis(250),
            queued_max: 1024,
            queued_bytes_max: 256 << 20,
            queued_time_max: Duration::from_secs(2),
            answers_bytes_max: 64 << 20,
            answers_age_max: Duration::from_mins(1),
            quarantine: Duration::from_mins(10),
            losses_max: 3,
            slots_max: 1024,
            uploads_per_client_max: 4,
            uploads_max: 64,
            upload_bytes_open_max: 16 << 30,
            upload_bytes_max: limits::UPLOAD_BYTES_MAX,
            upload_bytes_pending_max: 64 << 20,
            upload_idle: Duration::from_mins(5),
            upload_silence: Duration::from_secs(15),
            upload_wait: Duration::from_millis(250),
            upload_kept: Duration::from_hours(24),
            parts_max: 64,
            store_bytes_max: 64 << 30,
            model_bytes_max: limits::MODEL_BYTES_MAX,
            model_store_bytes_max: 32 << 30,
            registrations_max: 1024,
            registrations_open_max: 64,
            registrations_waiting_max: 1024,
            registration_retry: Duration::from_secs(10),
            store_commands_max: 64,
            store_waiting_max: 1024,
            store_timeout: Duration::from_mins(1),
            fan_out: 1,
            warms_waiting_max: 256,
            fetches_per_worker_max: 256,
        }
    }
}

/// Limits that fit together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config(Limits);

/// A limit that the broker could not work with.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidConfig {
    /// Nothing would ever be accepted.
    #[error("`{0}` is 0: it must be at least 1")]
    Zero(&'static str),
    /// Larger than the wire allows.
    #[error("`{name}` is {value}: the protocol allows at most {max}")]
    TooLarge {
        /// The limit's name.
        name: &'static str,
        /// What it was set to.
        value: u64,
        /// The largest accepted value.
        max: u64,
    },
    /// A dispatch would count as lost after its worker does.
    #[error(
        "`dispatch_lost_ms` is {dispatch_lost_ms}: it must be less than `worker_silence_ms`, which is {worker_silence_ms}"
    )]
    Order {
        /// When a dispatch counts as lost.
        dispatch_lost_ms: u128,
        /// When a worker counts as lost.
        worker_silence_ms: u128,
    },
}

impl Config {
    /// Checks `limits`.
    ///
    /// # Errors
    /// The first limit that makes no sense, alone or with the others.
    pub fn try_new(limits: Limits) -> Result<Self, InvalidConfig> {
        Self::check_zeros(&limits)?;
        Self::check_maxima(&limits)?;
        if limits.dispatch_lost >= limits.worker_silence {
            return Err(InvalidConfig::Order {
                dispatch_lost_ms: limits.dispatch_lost.as_millis(),
                worker_silence_ms: limits.worker_silence.as_millis(),
            });
        }
        Ok(Self(limits))
    }

    /// The checked limits.
    pub const fn limits(&self) -> &Limits {
        &self.0
    }

    fn check_zeros(limits: &Limits) -> Result<(), InvalidConfig> {
        let zeros = [
            ("dispatch_lost_ms", limits.dispatch_lost.is_zero()),
            ("budget_default_ms", limits.budget_default.is_zero()),
            ("queued_max", limits.queued_max == 0),
            ("queued_bytes_max", limits.queued_bytes_max == 0),
            ("queued_time_max_ms", limits.queued_time_max.is_zero()),
            ("losses_max", limits.losses_max == 0),
            ("slots_max", limits.slots_max == 0),
            ("uploads_per_client_max", limits.uploads_per_client_max == 0),
            ("uploads_max", limits.uploads_max == 0),
            ("upload_bytes_open_max", limits.upload_bytes_open_max == 0),
            ("upload_bytes_max", limits.upload_bytes_max == 0),
            ("upload_idle_ms", limits.upload_idle.is_zero()),
            ("upload_wait_ms", limits.upload_wait.is_zero()),
            ("store_bytes_max", limits.store_bytes_max == 0),
            ("model_bytes_max", limits.model_bytes_max == 0),
            ("model_store_bytes_max", limits.model_store_bytes_max == 0),
            ("registrations_max", limits.registrations_max == 0),
            ("registrations_open_max", limits.registrations_open_max == 0),
            ("registrations_waiting_max", limits.registrations_waiting_max == 0),
            ("registration_retry_ms", limits.registration_retry.is_zero()),
            ("store_commands_max", limits.store_commands_max == 0),
            ("store_waiting_max", limits.store_waiting_max == 0),
            ("store_timeout_ms", limits.store_timeout.is_zero()),
            ("warms_waiting_max", limits.warms_waiting_max == 0),
            ("fetches_per_worker_max", limits.fetches_per_worker_max == 0),
        ];
        match zeros.into_iter().find(|&(_, zero)| zero) {
            Some((name, _)) => Err(InvalidConfig::Zero(name)),
            None => Ok(()),
        }
    }

    fn check_maxima(limits: &Limits) -> Result<(), InvalidConfig> {
        let budget_ms = u64::try_from(limits.budget_default.as_millis()).unwrap_or(u64::MAX);
        let maxima = [
            ("budget_default_ms", budget_ms, u64::from(limits::BUDGET_MS_MAX)),
            ("upload_bytes_max", limits.upload_bytes_max, limits::UPLOAD_BYTES_MAX),
            ("model_bytes_max", limits.model_bytes_max, limits::MODEL_BYTES_MAX),
        ];
        match maxima.into_iter().find(|&(_, value, max)| value > max) {
            Some((name, value, max)) => Err(InvalidConfig::TooLarge { name, value, max }),
            None => Ok(()),
        }
    }
}

impl Default for Config {
    fn default() -> Self {
        Self::try_new(Limits::default()).expect("the defaults fit together: a test says so")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_fit_together() {
        assert_eq!(Config::default().limits(), &Limits::default());
    }

    #[test]
    fn a_limit_that_makes_no_sense_is_named() {
        let check = |limits| Config::try_new(limits).unwrap_err().to_string();

        assert_eq!(
            check(Limits { queued_max: 0, ..Limits::default() }),
            "`queued_max` is 0: it must be at least 1"
        );
        assert_eq!(
            check(Limits { upload_bytes_max: 3 << 30, ..Limits::default() }),
            "`upload_bytes_max` is 3221225472: the protocol allows at most 2147483648"
        );
        assert_eq!(
            check(Limits { dispatch_lost: Duration::from_secs(2), ..Limits::default() }),
            "`dispatch_lost_ms` is 2000: it must be less than `worker_silence_ms`, which is 2000"
        );
    }
}
