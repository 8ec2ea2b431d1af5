//! Addresses of sockets: parsed, checked, and written back in one canonical spelling.
//!
//! An [`Endpoint`] is syntax and limits only. Whether it may be bound is the listener's decision.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// `tcp://HOST:PORT` or `ipc://PATH`.
///
/// `localhost` is read as `127.0.0.1`, so that both sides mean the same address on every host.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Endpoint(Address);

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Address {
    Tcp { host: Host, port: u16 },
    Ipc(PathBuf),
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Host {
    Ip(IpAddr),
    /// Resolved anew at each connect.
    Name(String),
}

/// A text that is not an endpoint, and what to write instead.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("endpoint `{}` {fault}", endpoint.escape_debug())]
pub struct EndpointError {
    /// The text as given.
    pub endpoint: String,
    /// What is wrong with it.
    pub fault: EndpointFault,
}

/// What is wrong with the text of an endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EndpointFault {
    /// Neither `tcp://` nor `ipc://`.
    #[error("has no known transport: write `tcp://127.0.0.1:PORT` or `ipc:///PATH`")]
    UnknownTransport,
    /// `*` in place of an address.
    #[error(
        "has a wildcard: name the address, such as `tcp://127.0.0.1:19283` or \
         `ipc:///run/luna/broker.sock`"
    )]
    Wildcard,
    /// No host, or one with characters that no host name has.
    #[error("has no valid host: write `tcp://HOST:PORT`, an IPv6 address in brackets")]
    InvalidHost,
    /// No port, or one that is not a number up to 65535.
    #[error("has no valid port: write `tcp://HOST:PORT` with a port from 0 to 65535")]
    InvalidPort,
    /// `ipc://` and nothing behind it.
    #[error("has no path: write `ipc:///run/luna/broker.sock`")]
    EmptyPath,
    /// `ipc://@name`, which would become a file called `@name`.
    #[error(
        "names an abstract socket, which has no file mode to protect it: write the path of a \
         file, such as `ipc:///run/luna/broker.sock`"
    )]
    AbstractSocket,
    /// A control character in the path.
    #[error("has a control character in its path: write a plain path")]
    InvalidPath,
    /// A path that does not fit a socket address.
    #[error("has a path of {bytes} bytes and sockets allow {max}: choose a shorter directory")]
    PathTooLong {
        /// Its length.
        bytes: usize,
        /// The longest allowed.
        max: usize,
    },
}

impl Endpoint {
    /// The longest path of a Unix socket in bytes: `sun_path` without its final zero.
    pub const IPC_PATH_BYTES_MAX: usize = 107;

    /// Returns the path of an `ipc` endpoint.
    pub fn ipc_path(&self) -> Option<&Path> {
        match &self.0 {
            Address::Ipc(path) => Some(path),
            Address::Tcp { .. } => None,
        }
    }

    /// Returns the port of a `tcp` endpoint.
    pub fn tcp_port(&self) -> Option<u16> {
        match &self.0 {
            Address::Tcp { port, .. } => Some(*port),
            Address::Ipc(_) => None,
        }
    }

    /// Returns the same `tcp` endpoint at `port`, or nothing for an `ipc` endpoint.
    #[must_use]
    pub fn with_tcp_port(&self, port: u16) -> Option<Self> {
        match &self.0 {
            Address::Tcp { host, .. } => Some(Self(Address::Tcp { host: host.clone(), port })),
            Address::Ipc(_) => None,
        }
    }

    /// Tells whether only processes on this machine can reach the endpoint.
    pub fn is_local(&self) -> bool {
        match &self.0 {
            Address::Ipc(_) => true,
            Address::Tcp { host: Host::Ip(ip), .. } => ip.is_loopback(),
            Address::Tcp { host: Host::Name(_), .. } => false,
        }
    }

    /// Returns the parsed parts.
    pub(crate) fn address(&self) -> &Address {
        &self.0
    }
}

impl FromStr for Endpoint {
    type Err = EndpointError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let address = if let Some(address) = text.strip_prefix("tcp://") {
            parse_tcp(address)
        } else if let Some(path) = text.strip_prefix("ipc://") {
            parse_ipc(path)
        } else {
            Err(EndpointFault::UnknownTransport)
        };
        match address {
            Ok(address) => Ok(Self(address)),
            Err(fault) => Err(EndpointError { endpoint: text.to_owned(), fault }),
        }
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Address::Tcp { host: Host::Ip(IpAddr::V6(ip)), port } => {
                write!(formatter, "tcp://[{ip}]:{port}")
            }
            Address::Tcp { host: Host::Ip(IpAddr::V4(ip)), port } => {
                write!(formatter, "tcp://{ip}:{port}")
            }
            Address::Tcp { host: Host::Name(name), port } => {
                write!(formatter, "tcp://{name}:{port}")
            }
            Address::Ipc(path) => write!(formatter, "ipc://{}", path.display()),
        }
    }
}

fn parse_tcp(address: &str) -> Result<Address, EndpointFault> {
    let (host, port) = address.rsplit_once(':').ok_or(EndpointFault::InvalidPort)?;
    if host == "*" || port == "*" {
        return Err(EndpointFault::Wildcard);
    }
    // `u16::from_str` would take a sign.
    let is_number = port.bytes().all(|byte| byte.is_ascii_digit());
    let port = port.parse().ok().filter(|_| is_number).ok_or(EndpointFault::InvalidPort)?;
    let host = parse_host(host).ok_or(EndpointFault::InvalidHost)?;
    Ok(Address::Tcp { host, port })
}

fn parse_host(host: &str) -> Option<Host> {
    /// The longest name that DNS allows.
    const NAME_BYTES_MAX: usize = 253;
    if host == "localhost" {
        return Some(Host::Ip(Ipv4Addr::LOCALHOST.into()));
    }
    if let Some(bracketed) = host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
        let ip: Ipv6Addr = bracketed.parse().ok()?;
        return Some(Host::Ip(ip.into()));
    }
    if let Ok(ip) = host.parse::<Ipv4Addr>() {
        return Some(Host::Ip(ip.into()));
    }
    let is_name_byte =
        |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_');
    // A name of digits and dots alone is a mistyped address.
    let is_name = (1..=NAME_BYTES_MAX).contains(&host.len())
        && host.bytes().all(is_name_byte)
        && host.bytes().any(|byte| byte.is_ascii_alphabetic());
    is_name.then(|| Host::Name(host.to_ascii_lowercase()))
}

fn parse_ipc(path: &str) -> Result<Address, EndpointFault> {
    let (bytes, max) = (path.len(), Endpoint::IPC_PATH_BYTES_MAX);
    if path.is_empty() {
        Err(EndpointFault::EmptyPath)
    } else if path == "*" {
        Err(EndpointFault::Wildcard)
    } else if path.starts_with('@') {
        Err(EndpointFault::AbstractSocket)
    } else if path.chars().any(char::is_control) {
        Err(EndpointFault::InvalidPath)
    } else if bytes > max {
        Err(EndpointFault::PathTooLong { bytes, max })
    } else {
        Ok(Address::Ipc(PathBuf::from(path)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_endpoint_is_displayed_as_it_is_parsed() {
        for text in [
            "tcp://127.0.0.1:19283",
            "tcp://[::1]:19283",
            "tcp://10.0.0.7:0",
            "tcp://broker-1.farm.example:65535",
            "ipc:///run/luna/broker.sock",
            "ipc://relative.sock",
        ] {
            assert_eq!(parse(text).unwrap().to_string(), text);
        }
        assert_eq!(parse("tcp://localhost:7").unwrap().to_string(), "tcp://127.0.0.1:7");
    }

    #[test]
    fn only_ipc_and_loopback_are_local() {
        for text in ["ipc://x", "tcp://127.0.0.1:1", "tcp://127.1.2.3:1", "tcp://[::1]:1"] {
            assert!(parse(text).unwrap().is_local(), "{text}");
        }
        for text in ["tcp://0.0.0.0:1", "tcp://[::]:1", "tcp://10.0.0.1:1", "tcp://farm:1"] {
            assert!(!parse(text).unwrap().is_local(), "{text}");
        }
    }

    #[test]
    fn what_zeromq_would_misread_is_refused_with_advice() {
        for (text, advice) in [
            ("", "write `tcp://127.0.0.1:PORT` or `ipc:///PATH`"),
            ("127.0.0.1:19283", "write `tcp://127.0.0.1:PORT`"),
            ("udp://127.0.0.1:1", "no known transport"),
            ("TCP://127.0.0.1:1", "no known transport"),
            ("tcp://*:5555", "wildcard"),
            ("tcp://127.0.0.1:*", "wildcard"),
            ("ipc://*", "wildcard"),
            ("tcp://127.0.0.1", "port from 0 to 65535"),
            ("tcp://127.0.0.1:", "port from 0 to 65535"),
            ("tcp://127.0.0.1:65536", "port from 0 to 65535"),
            ("tcp://127.0.0.1:+1", "port from 0 to 65535"),
            ("tcp://:1", "no valid host"),
            ("tcp://::1:1", "IPv6 address in brackets"),
            ("tcp://[::1:1", "no valid host"),
            ("tcp://127.0.0:1", "no valid host"),
            ("tcp://a b:1", "no valid host"),
            ("ipc://", "has no path"),
            ("ipc://@", "abstract socket"),
            ("ipc://@luna", "abstract socket"),
            ("ipc://a\nb", "control character"),
        ] {
            let error = parse(text).unwrap_err().to_string();
            assert!(error.contains(advice), "{text:?}: {error}");
        }
    }

    #[test]
    fn the_longest_path_fits_and_one_byte_more_does_not() {
        let longest = format!("ipc://{}", "p".repeat(Endpoint::IPC_PATH_BYTES_MAX));
        assert!(parse(&longest).is_ok());
        let error = parse(&format!("{longest}p")).unwrap_err().to_string();
        assert!(error.contains("108 bytes and sockets allow 107"), "{error}");
    }

    fn parse(text: &str) -> Result<Endpoint, EndpointError> {
        text.parse()
    }
}
