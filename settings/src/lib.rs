//! Settings from defaults, TOML, environment and flags, with all mistakes reported at once.
//!
//! A key such as `broker.queue_max` is looked up, the first hit wins, in
//!
//! 1. the command line: [`Settings::set`],
//! 2. the environment: `LUNA_BROKER_QUEUE_MAX`,
//! 3. the files, the last one first: `queue_max` in the table `[broker]`,
//! 4. the default in the code.
//!
//! Every value has one text form and is read with `FromStr`, whatever its source, so `70000` is
//! no `u16` and `1.5` no integer anywhere. Values are read one after the other through a
//! [`Reader`], which remembers each mistake and goes on with the default; [`Reader::finish`] then
//! names all of them, unknown keys included. Nothing here reads the process environment or knows
//! any key: both come from the caller.
//!
//! ```
//! use luna_settings::{Settings, accept, within};
//!
//! let settings = Settings::new(&["broker", "worker"])
//!     .env("LUNA", [("LUNA_BROKER_PORT".into(), "70000".into())])
//!     .set("broker.qeue_max", 5);
//! let mut reader = settings.reader();
//! let port: u16 = reader.get("broker.port", "TCP port for clients", 19283, accept);
//! let queue = reader.get("broker.queue_max", "requests that may wait", 512, within(1..=65_536));
//! assert_eq!((port, queue), (19283, 512));
//! assert_eq!(
//!     reader.finish().unwrap_err().to_string(),
//!     "2 mistakes in the settings:\n\
//!      - `broker.port` is \"70000\" (environment variable LUNA_BROKER_PORT): not a `u16`: \
//!        number too large to fit in target type\n\
//!      - `broker.qeue_max` is \"5\" (command line): unknown key; did you mean `broker.queue_max`?"
//! );
//! ```

mod describe;
mod file;
mod mistake;
mod reader;
mod sources;
mod suggest;
mod time;
mod validate;

pub use describe::Entry;
pub use mistake::{Mistake, Origin, SettingsErrors};
pub use reader::Reader;
pub use sources::Settings;
pub use time::{InvalidTime, Time};
pub use validate::{accept, at_least, within};
