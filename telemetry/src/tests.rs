//! What comes out of a configured subscriber.

use std::io::{self, Write};
use std::sync::{Arc, Mutex};

use serde_json::Value;
use tracing::{debug, error, info, info_span, warn};

use super::*;

#[test]
fn text_is_one_short_aligned_line_per_event() {
    let log = log(&LogConfig::new("luna"), false, || {
        info!(target: "luna_transport::router", endpoint = "ipc:///x", "bound");
        info_span!("request", id = 7).in_scope(|| warn!(target: "luna_broker", "slow"));
    });
    let lines: Vec<&str> = log.lines().map(|line| &line[TIME.len()..]).collect();
    assert_eq!(
        lines,
        ["  INFO transport  bound endpoint=\"ipc:///x\"", "  WARN broker     request{id=7}: slow",]
    );
    assert!(!log.contains('\x1b'));
}

#[test]
fn colour_is_used_only_where_it_is_wanted() {
    let log = log(&LogConfig::new("luna"), true, || error!("broken"));
    assert!(log.contains("\x1b[31mERROR\x1b[0m"), "{log:?}");
}

#[test]
fn json_is_one_object_per_line_with_typed_fields() {
    let config = LogConfig { format: LogFormat::Json, ..LogConfig::new("luna-worker@0") };
    let log = log(&config, true, || {
        info_span!("request", id = 7).in_scope(|| {
            info!(target: "luna_worker", rows = 3, ratio = 0.5, text = "a\n\"b\"", ok = true, "done");
        });
        info!(ratio = f64::NAN, "odd");
    });
    let lines: Vec<Value> = log.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.len(), 2);
    assert_eq!(lines[0]["level"], "INFO");
    assert_eq!(lines[0]["process"], "luna-worker@0");
    assert_eq!(lines[0]["target"], "luna_worker");
    assert_eq!(lines[0]["spans"], "request{id=7}");
    assert!(lines[0]["timestamp"].as_str().unwrap().ends_with('Z'));
    let fields = serde_json::json!({
        "message": "done", "rows": 3, "ratio": 0.5, "text": "a\n\"b\"", "ok": true,
    });
    assert_eq!(lines[0]["fields"], fields);
    assert_eq!(lines[1]["fields"]["ratio"], "NaN");
    assert!(lines[1].get("spans").is_none());
}

#[test]
fn the_filter_decides_by_level_and_target() {
    let filter = "warn,luna_broker=debug".to_owned();
    let config = LogConfig { filter, ..LogConfig::new("luna") };
    let log = log(&config, false, || {
        info!(target: "luna_worker", "hidden");
        warn!(target: "luna_worker", "shown");
        debug!(target: "luna_broker", "shown too");
    });
    assert_eq!(log.lines().count(), 2, "{log}");
    assert!(!log.contains("hidden"));
}

#[test]
fn a_filter_that_cannot_be_read_is_named() {
    let config = LogConfig { filter: "luna=loud".to_owned(), ..LogConfig::new("luna") };
    let Err(error) = subscriber(&config, io::sink, false) else { panic!("accepted") };
    assert!(error.to_string().contains("`luna=loud`"), "{error}");
}

/// A process has one subscriber and one panic hook, so one test tries both.
#[test]
fn a_panic_is_logged_and_a_second_start_is_refused() {
    let config = LogConfig { format: LogFormat::Json, ..LogConfig::new("luna") };
    let buffer = Buffer::default();
    subscriber(&config, buffer.clone(), false).unwrap().try_init().unwrap();
    panic::install_hook();
    let doomed = std::thread::Builder::new().name("doomed".to_owned());
    assert!(doomed.spawn(|| panic!("no adapter")).unwrap().join().is_err());

    let log = buffer.text();
    let event: Value = serde_json::from_str(log.lines().next().unwrap()).unwrap();
    assert_eq!(event["level"], "ERROR");
    assert_eq!(event["fields"]["message"], "panic: no adapter");
    assert_eq!(event["fields"]["thread"], "doomed");
    assert!(event["fields"]["location"].as_str().unwrap().contains("tests.rs:"), "{event}");
    assert!(matches!(init(&config), Err(InitError::AlreadyStarted(_))));
}

/// What stands before the level.
const TIME: &str = "18:28:54.123Z";

fn log(config: &LogConfig, use_colour: bool, events: impl FnOnce()) -> String {
    let buffer = Buffer::default();
    let subscriber = subscriber(config, buffer.clone(), use_colour).unwrap();
    tracing::subscriber::with_default(subscriber, events);
    buffer.text()
}

#[derive(Clone, Default)]
struct Buffer(Arc<Mutex<Vec<u8>>>);

impl Buffer {
    fn text(&self) -> String {
        String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
    }
}

impl Write for Buffer {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Buffer {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        self.clone()
    }
}
