//! `luna bench`: measures a broker and prints tables.

use std::{env, path::PathBuf, process::ExitCode};

use anyhow::Context as _;
use bench::{
    BrokerPlan, BrokerReport, IdleReport, LatencySummary, LoadReport, Measurement, OverloadPlan,
    OverloadReport,
};

use crate::{
    args::{BenchBrokerArgs, BenchCommand, BenchOverloadArgs},
    output::{human_bytes, print_json, print_line, print_table, print_warning, spinner},
};

/// Runs a bench. Blocks: the benches have threads and runtimes of their own.
pub(crate) fn run(command: BenchCommand) -> anyhow::Result<ExitCode> {
    // Every idle client has a few files open.
    process::raise_file_limit();
    match command {
        BenchCommand::Broker(args) => broker(args),
        BenchCommand::Overload(args) => overload(args),
    }
}

fn broker(args: BenchBrokerArgs) -> anyhow::Result<ExitCode> {
    let plan = BrokerPlan {
        executable: executable(args.broker_exe)?,
        python: args.python,
        sizes: args.sizes.iter().map(|sizes| sizes.0).collect(),
        in_flight: args.in_flight.iter().map(|&count| count as usize).collect(),
        duration: args.duration.0,
        idle_clients: args.idle_clients as usize,
    };
    let report = with_progress(|progress| bench::broker::run(&plan, progress))?;
    if let Some(reason) = &report.proxy_missing {
        print_warning(&format!(
            "there is no libzmq proxy to compare with ({reason}): name a Python with pyzmq, \
             `--python PATH`"
        ));
    }
    if args.json {
        print_json(&report)?;
    } else {
        show_broker(&report);
    }
    Ok(ExitCode::SUCCESS)
}

fn overload(args: BenchOverloadArgs) -> anyhow::Result<ExitCode> {
    let plan = OverloadPlan {
        executable: executable(args.broker_exe)?,
        workers: args.workers as usize,
        service: args.service.0,
        budget: args.budget.0,
        duration: args.duration.0,
    };
    let report = with_progress(|progress| bench::overload::run(&plan, progress))?;
    if args.json {
        print_json(&report)?;
    } else {
        show_overload(&report);
    }
    Ok(ExitCode::SUCCESS)
}

fn executable(named: Option<PathBuf>) -> anyhow::Result<PathBuf> {
    named.map_or_else(|| env::current_exe().context("this program has no path"), Ok)
}

/// Shows on standard error what a bench is at.
fn with_progress<R>(
    run: impl FnOnce(&mut dyn FnMut(&str)) -> anyhow::Result<R>,
) -> anyhow::Result<R> {
    let bar = spinner("starting");
    let result = run(&mut |what| bar.set_message(what.to_owned()));
    bar.finish_and_clear();
    result
}

fn show_broker(report: &BrokerReport) {
    let proxy = report.proxy.as_deref().unwrap_or("no proxy");
    print_line(format_args!("{} cores, shared with the load; {proxy}", report.cores));
    let mut rows = Vec::new();
    for cell in &report.cells {
        let what =
            [cell.request_bytes, cell.reply_bytes, cell.in_flight].map(|number| number.to_string());
        let mut row = |name: &str, measured: &Measurement| {
            rows.push([&what[..], &[name.to_owned()], &columns(measured)].concat());
        };
        row("direct", &cell.direct);
        row("luna", &cell.broker);
        if let Some(proxy) = &cell.proxy {
            row("proxy", proxy);
        }
    }
    let header = [
        "request B",
        "reply B",
        "in flight",
        "through",
        "per s",
        "slowest",
        "fastest",
        "p50 us",
        "p99 us",
        "CPU us",
        "RSS",
    ];
    print_table(&header, rows);
    print_line(format_args!(""));
    show_comparison(report);
    if let Some(idle) = &report.idle {
        print_line(format_args!(""));
        show_idle(idle);
    }
}

fn columns(measured: &Measurement) -> [String; 7] {
    let Measurement { latency, per_second, per_second_min, per_second_max, .. } = measured;
    let or_none = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
    [
        format!("{per_second:.0}"),
        format!("{per_second_min:.0}"),
        format!("{per_second_max:.0}"),
        format!("{:.0}", latency.p50_us),
        format!("{:.0}", latency.p99_us),
        or_none(measured.cpu_us_per_request.map(|cpu| format!("{cpu:.0}"))),
        or_none(measured.resident_bytes.map(human_bytes)),
    ]
}

/// What the broker adds to direct round trips, and how it stands to the proxy.
fn show_comparison(report: &BrokerReport) {
    let rows = report.cells.iter().map(|cell| {
        let ratio = |of: fn(&Measurement) -> Option<f64>| {
            cell.ratio(of).map_or_else(|| "-".to_owned(), |ratio| format!("{ratio:.2}"))
        };
        vec![
            cell.request_bytes.to_string(),
            cell.reply_bytes.to_string(),
            cell.in_flight.to_string(),
            format!("{:.0}", cell.added_us(|latency| latency.p50_us)),
            format!("{:.0}", cell.added_us(|latency| latency.p99_us)),
            ratio(|measured| Some(measured.per_second)),
            ratio(|measured| Some(measured.latency.p50_us)),
            ratio(|measured| Some(measured.latency.p99_us)),
            ratio(|measured| measured.cpu_us_per_request),
        ]
    });
    let header = [
        "request B",
        "reply B",
        "in flight",
        "added p50 us",
        "added p99 us",
        "luna/proxy: per s",
        "p50",
        "p99",
        "CPU",
    ];
    print_table(&header, rows);
}

fn show_idle(idle: &IdleReport) {
    print_line(format_args!(
        "{} idle clients: RSS {} with them, {} without; {:.1} % of a core for their heartbeats; all \
         connected after {:.0} ms",
        idle.clients,
        human_bytes(idle.resident_bytes),
        human_bytes(idle.resident_bytes_before),
        idle.cpu_share * 100.0,
        idle.connect_ms,
    ));
}

fn show_overload(report: &OverloadReport) {
    print_line(format_args!(
        "{} cores, shared with the load; {} workers of {} ms: {:.0} requests/s",
        report.cores, report.workers, report.service_ms, report.capacity_per_second
    ));
    let loads = [
        ("capacity", &report.full),
        ("3 x capacity", &report.over),
        ("polite alone", &report.polite_alone),
        ("polite beside greedy", &report.polite_beside_greedy),
        ("greedy", &report.greedy),
    ];
    let header = [
        "load",
        "clients",
        "offered/s",
        "good/s",
        "p50 ms",
        "p99 ms",
        "overloaded",
        "its p99 ms",
        "retry after ms",
        "late",
        "other",
        "sent late, p99 ms",
    ];
    print_table(&header, loads.map(|(name, load)| load_row(name, load)));
    print_line(format_args!(""));
    print_line(format_args!(
        "goodput at 3 x capacity: {:.1} % of the peak; overloaded is answered within {} ms (p99)",
        report.goodput_share * 100.0,
        milliseconds(&report.over.rejected, |latency| latency.p99_us),
    ));
    print_line(format_args!(
        "polite clients' p99 beside a greedy one: {:+.0} %",
        (report.polite_p99_ratio - 1.0) * 100.0
    ));
}

fn load_row(name: &str, load: &LoadReport) -> Vec<String> {
    let advice =
        load.retry_after_ms.map(|[least, median, most]| format!("{least}/{median}/{most}"));
    let other = load.failed.values().sum::<u64>() + load.lost + load.unsent;
    vec![
        name.to_owned(),
        load.clients.to_string(),
        format!("{:.0}", load.offered_per_second),
        format!("{:.0}", load.goodput_per_second),
        milliseconds(&load.good, |latency| latency.p50_us),
        milliseconds(&load.good, |latency| latency.p99_us),
        load.rejected.count.to_string(),
        milliseconds(&load.rejected, |latency| latency.p99_us),
        advice.unwrap_or_else(|| "-".to_owned()),
        load.late.to_string(),
        other.to_string(),
        milliseconds(&load.lateness, |latency| latency.p99_us),
    ]
}

fn milliseconds(latencies: &LatencySummary, of: fn(&LatencySummary) -> f64) -> String {
    if latencies.count == 0 { "-".to_owned() } else { format!("{:.1}", of(latencies) / 1e3) }
}
