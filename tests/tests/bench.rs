//! `luna bench` measures what it says. Nothing here judges how fast anything was.

use std::process::Command;

use luna_e2e::binary::luna;
use serde_json::Value;

/// Resident memory that a broker may take with 1,000 idle clients.
const RESIDENT_BYTES_MAX: u64 = 200 << 20;

#[test]
fn a_broker_is_measured_with_1_000_idle_clients_and_without_a_proxy() {
    let report = bench(&[
        "broker",
        "--duration",
        "300ms",
        "--in-flight",
        "1,16",
        "--sizes",
        "64:64,256:241664",
        "--idle-clients",
        "1000",
        "--python",
        "/no/such/python",
    ]);
    let missing = report["proxy_missing"].as_str().expect("it says why there is no proxy");
    assert!(missing.contains("/no/such/python"), "{missing}");
    let cells = report["cells"].as_array().expect("there are cells");
    assert_eq!(cells.len(), 4);
    for cell in cells {
        assert!(cell["proxy"].is_null(), "{cell}");
        for site in ["direct", "broker"] {
            assert!(cell[site]["latency"]["count"].as_u64() > Some(0), "{cell}");
            assert!(cell[site]["per_second"].as_f64() > Some(0.0), "{cell}");
            let latency = &cell[site]["latency"];
            assert!(latency["p50_us"].as_f64() <= latency["p99_us"].as_f64(), "{cell}");
        }
        assert!(cell["broker"]["resident_bytes"].as_u64() > Some(0), "{cell}");
    }
    let idle = &report["idle"];
    assert_eq!(idle["clients"], 1000);
    let resident = idle["resident_bytes"].as_u64().expect("memory is measured");
    assert!(resident <= RESIDENT_BYTES_MAX, "{resident} bytes");
}

#[test]
fn every_request_of_an_overload_is_accounted_for() {
    let report = bench(&["overload", "--duration", "500ms", "--workers", "2", "--service", "20ms"]);
    assert!(report["capacity_per_second"].as_f64() > Some(0.0));
    for load in ["full", "over", "polite_alone", "polite_beside_greedy", "greedy"] {
        let load = &report[load];
        let count = |value: &Value| value.as_u64().expect("a count");
        let answered = count(&load["good"]["count"])
            + count(&load["rejected"]["count"])
            + count(&load["late"]);
        assert!(answered > 0, "{load}");
        assert_eq!(load["failed"].as_object().map(serde_json::Map::len), Some(0), "{load}");
        assert_eq!(count(&load["unsent"]), 0, "{load}");
    }
}

fn bench(arguments: &[&str]) -> Value {
    let output = Command::new(luna()).arg("bench").args(arguments).arg("--json").output();
    let output = output.expect("`luna` can be started");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("`--json` prints JSON")
}
