//! Binding: a listening TCP or Unix socket that `zeromq` then adopts.
//!
//! We bind ourselves because `zeromq` neither replaces a stale socket file nor sets its mode,
//! panics on `ipc://*`, and gives no access to keepalive.
//!
//! **Invariants:** a socket file is never reachable with a mode other than 0600, and a live one is
//! never unlinked: Luna processes hold a lock on the directory while they probe, unlink and bind.

use std::fs::{File, Metadata, TryLockError};
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use rustix::fs::{Mode, fchmod};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, sockopt};

use crate::endpoint::{Address, Endpoint, Host};

/// Connections that may wait to be accepted; the kernel has a bound of its own (`somaxconn`).
const BACKLOG: i32 = 4096;

/// A listener that is bound and listening but not yet served.
#[derive(Debug)]
pub(crate) struct Bound {
    pub(crate) listener: zeromq::Listener,
    /// With the port that the system chose, if it was asked to.
    pub(crate) endpoint: Endpoint,
}

/// Why a ROUTER could not be bound.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// The endpoint can be reached from other machines.
    #[error(
        "refused to bind `{endpoint}`: it is reachable from the network, and network binds need keys, which come with a later version; bind `tcp://127.0.0.1:PORT` or `ipc:///PATH`"
    )]
    BindRefused {
        /// The endpoint as given.
        endpoint: Endpoint,
    },
    /// Somebody listens there.
    #[error("`{endpoint}` is in use by another process: stop it or choose another endpoint")]
    AddrInUse {
        /// The endpoint as given.
        endpoint: Endpoint,
    },
    /// The directory of the socket file does not exist.
    #[error("the directory `{}` of `{endpoint}` does not exist: create it first", directory.display())]
    MissingDirectory {
        /// The endpoint as given.
        endpoint: Endpoint,
        /// The directory that is missing.
        directory: PathBuf,
    },
    /// The path is taken by something that is not a socket, which is never removed.
    #[error("`{}` exists and is not a socket: remove it or choose another path", path.display())]
    NotASocket {
        /// The path at fault.
        path: PathBuf,
    },
    /// A limit of the configuration is out of range.
    #[error("`{name}` of the ROUTER is out of range: {advice}")]
    InvalidConfig {
        /// The field at fault.
        name: &'static str,
        /// What to write.
        advice: &'static str,
    },
    /// Anything else that the system refused.
    #[error("cannot bind `{endpoint}`")]
    Io {
        /// The endpoint as given.
        endpoint: Endpoint,
        /// The system's answer.
        source: io::Error,
    },
}

/// Binds `endpoint`. A TCP connection whose peer takes nothing for `stall` is closed by the kernel.
pub(crate) fn bind(endpoint: &Endpoint, stall: Duration) -> Result<Bound, BindError> {
    // The guard's place: a later version accepts connections here itself, authenticates them,
    // checks their ZMTP frames against limits, and hands `zeromq` only a private listener. Until
    // then nothing that a network can reach is bound.
    if !endpoint.is_local() {
        return Err(BindError::BindRefused { endpoint: endpoint.clone() });
    }
    match endpoint.address() {
        Address::Tcp { host: Host::Ip(ip), port } => {
            bind_tcp(SocketAddr::new(*ip, *port), endpoint, stall)
        }
        Address::Tcp { host: Host::Name(_), .. } => {
            Err(BindError::BindRefused { endpoint: endpoint.clone() })
        }
        Address::Ipc(path) => bind_ipc(path, endpoint),
    }
}

/// Locks the directory of `path` against other Luna processes until the file is dropped.
pub(crate) fn lock_directory(path: &Path) -> io::Result<File> {
    const PATIENCE: Duration = Duration::from_secs(2);
    const POLL: Duration = Duration::from_millis(2);
    let directory = File::open(directory(path))?;
    let deadline = Instant::now() + PATIENCE;
    loop {
        match directory.try_lock() {
            Ok(()) => return Ok(directory),
            Err(TryLockError::WouldBlock) if Instant::now() < deadline => sleep(POLL),
            Err(error) => return Err(error.into()),
        }
    }
}

fn bind_tcp(address: SocketAddr, endpoint: &Endpoint, stall: Duration) -> Result<Bound, BindError> {
    let fail = |source| io_failure(endpoint, source);
    let listener = TcpListener::bind(address).map_err(fail)?;
    // The standard library asks for 128: when a broker returns, more clients come at once, and each
    // that finds the queue full loses a second until it asks again.
    rustix::net::listen(&listener, BACKLOG).map_err(|error| fail(error.into()))?;
    // Accepted connections inherit these: half-open peers are noticed although nothing is sent,
    // and a peer that takes nothing is closed.
    let keepalive = || -> rustix::io::Result<()> {
        sockopt::set_socket_keepalive(&listener, true)?;
        sockopt::set_tcp_keepidle(&listener, Duration::from_secs(5))?;
        sockopt::set_tcp_keepintvl(&listener, Duration::from_secs(2))?;
        sockopt::set_tcp_keepcnt(&listener, 3)?;
        let stall_ms = u32::try_from(stall.as_millis()).unwrap_or(u32::MAX);
        sockopt::set_tcp_user_timeout(&listener, stall_ms)
    };
    keepalive().map_err(|error| fail(error.into()))?;
    let port = listener.local_addr().map_err(fail)?.port();
    let endpoint =
        endpoint.with_tcp_port(port).expect("the endpoint is tcp: matched by the caller");
    Ok(Bound { listener: listener.into(), endpoint })
}

fn bind_ipc(path: &Path, endpoint: &Endpoint) -> Result<Bound, BindError> {
    let fail = |source| io_failure(endpoint, source);
    if !directory(path).is_dir() {
        let directory = directory(path).to_owned();
        return Err(BindError::MissingDirectory { endpoint: endpoint.clone(), directory });
    }
    let _lock = lock_directory(path).map_err(fail)?;
    match path.symlink_metadata() {
        Ok(metadata) => clear_stale(path, &metadata, endpoint)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(fail(error)),
    }
    let socket = listen_private(path).map_err(|error| fail(error.into()))?;
    let metadata = path.symlink_metadata().map_err(fail)?;
    if metadata.permissions().mode() & 0o777 != 0o600 {
        return Err(fail(io::Error::other("the file system does not keep mode 0600 of a socket")));
    }
    Ok(Bound { listener: UnixListener::from(socket).into(), endpoint: endpoint.clone() })
}

/// Unlinks the socket file at `path` if nobody listens on it.
fn clear_stale(path: &Path, metadata: &Metadata, endpoint: &Endpoint) -> Result<(), BindError> {
    if !metadata.file_type().is_socket() {
        return Err(BindError::NotASocket { path: path.to_owned() });
    }
    match probe(path) {
        Err(rustix::io::Errno::CONNREFUSED) => {
            tracing::info!(path = %path.display(), "removing the socket file of a dead process");
            std::fs::remove_file(path).map_err(|source| io_failure(endpoint, source))
        }
        Err(rustix::io::Errno::NOENT) => Ok(()),
        // A full backlog (EAGAIN) is somebody who listens.
        Ok(()) | Err(rustix::io::Errno::AGAIN) => {
            Err(BindError::AddrInUse { endpoint: endpoint.clone() })
        }
        Err(error) => Err(io_failure(endpoint, error.into())),
    }
}

/// Connects to the socket at `path` without waiting.
fn probe(path: &Path) -> rustix::io::Result<()> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)
}

/// Listens at `path` with a file that has mode 0600 from the moment it exists.
fn listen_private(path: &Path) -> rustix::io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    // Linux gives the file the mode of the unbound socket, less the umask. Changing the umask
    // instead would race with every other thread that creates a file.
    fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(socket)
}

fn directory(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        Some(_) | None => Path::new("."),
    }
}

fn io_failure(endpoint: &Endpoint, source: io::Error) -> BindError {
    let endpoint = endpoint.clone();
    if source.kind() == io::ErrorKind::AddrInUse {
        BindError::AddrInUse { endpoint }
    } else {
        BindError::Io { endpoint, source }
    }
}
