//! How a client is made.

use std::time::Duration;

use protocol::limits;
use transport::Endpoint;

use crate::{client::Client, error::Error};

/// Where a farm listens unless told otherwise.
pub const DEFAULT_ENDPOINT: &str = "tcp://127.0.0.1:19283";

/// A client in the making; every setting has a default.
#[derive(Debug, Clone)]
pub struct ClientBuilder {
    endpoint: String,
    timeout: Duration,
    connect_timeout: Duration,
}

impl Default for ClientBuilder {
    fn default() -> Self {
        Self {
            endpoint: DEFAULT_ENDPOINT.to_owned(),
            timeout: Duration::from_millis(u64::from(limits::BUDGET_MS_DEFAULT)),
            connect_timeout: Duration::from_secs(3),
        }
    }
}

impl ClientBuilder {
    /// Where the farm listens: `tcp://HOST:PORT` or `ipc:///PATH`.
    #[must_use]
    pub fn endpoint(mut self, endpoint: impl Into<String>) -> Self {
        self.endpoint = endpoint.into();
        self
    }

    /// The time budget of every request that names none; 30 s unless set.
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// How long requests wait for a farm that was never reached; 3 s unless set.
    /// A farm that was reached before is waited for until the request's own deadline.
    #[must_use]
    pub fn connect_timeout(mut self, timeout: Duration) -> Self {
        self.connect_timeout = timeout;
        self
    }

    /// Makes the client, which connects in the background.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`](crate::ErrorKind::Invalid) when a setting cannot be used.
    pub fn build(self) -> Result<Client, Error> {
        let endpoint: Endpoint =
            self.endpoint.parse().map_err(|error| Error::invalid(format!("{error}")))?;
        check_timeout(self.timeout)?;
        if self.connect_timeout.is_zero() {
            return Err(Error::invalid("the connect timeout is zero: give it some time"));
        }
        Client::new(endpoint, self.timeout, self.connect_timeout)
    }

    /// Makes the client and waits until it is connected.
    ///
    /// # Errors
    /// As [`ClientBuilder::build`], and [`ErrorKind::Unreachable`](crate::ErrorKind::Unreachable)
    /// when no farm is reached within the connect timeout.
    pub async fn connect(self) -> Result<Client, Error> {
        let client = self.build()?;
        client.connected().await?;
        Ok(client)
    }
}

/// Refuses a time budget that the wire cannot carry.
pub(crate) fn check_timeout(timeout: Duration) -> Result<(), Error> {
    let max = Duration::from_millis(u64::from(limits::BUDGET_MS_MAX));
    if timeout < Duration::from_millis(1) || timeout > max {
        let message = format!("the time budget is {timeout:?}: expected 1 ms to {max:?}");
        return Err(Error::invalid(message));
    }
    Ok(())
}
