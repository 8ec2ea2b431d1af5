//! Scenarios of the table, and the property that every request has exactly one outcome.

use proptest::prelude::*;
use protocol::{
    ErrorCode, Failure,
    reply::CancelReply,
    request::{EncodeOptions, Status},
};

use super::*;

const CONNECT: Duration = Duration::from_secs(3);

#[test]
fn a_request_waits_for_the_connection_and_carries_the_time_that_is_left() {
    let mut test = TestTable::new();
    test.start("a", 1000);
    assert_eq!(test.actions(), NOTHING);
    test.wait(300);
    test.connect();
    assert_eq!(test.actions(), ["send a with 700 ms"]);
    test.start("b", 500);
    assert_eq!(test.actions(), ["send b with 500 ms"]);
}

#[test]
fn whatever_is_open_is_sent_again_in_order_after_a_reconnect() {
    let mut test = TestTable::new();
    test.connect();
    for id in ["c", "a", "b"] {
        test.start(id, 1000);
    }
    test.reply("a");
    test.actions();

    test.table.handle_disconnected();
    test.start("d", 1000);
    test.wait(100);
    test.connect();
    let expected = ["c with 900 ms", "b with 900 ms", "d with 900 ms"].map(|s| format!("send {s}"));
    assert_eq!(test.actions(), expected);
}

#[test]
fn the_first_terminal_reply_wins_and_later_ones_are_counted() {
    let mut test = TestTable::new();
    test.connect();
    test.start("a", 1000);
    test.actions();
    test.reply("a");
    test.reply("a");
    test.fail("a");
    test.reply("stranger");
    assert_eq!(test.actions(), ["finish a: reply"]);
    assert_eq!(test.table.unclaimed(), Unclaimed { repeated: 2, other: 1 });
}

#[test]
fn a_reply_is_known_as_repeated_while_its_request_is_remembered() {
    let mut test = TestTable::new();
    test.connect();
    let answer = |test: &mut TestTable, id: &str| {
        test.start(id, 1000);
        test.reply(id);
    };
    answer(&mut test, "first");
    (1..ANSWERED_MAX).for_each(|number| answer(&mut test, &format!("r{number}")));
    test.reply("first");
    assert_eq!(test.table.unclaimed(), Unclaimed { repeated: 1, other: 0 });
    answer(&mut test, "one-more");
    test.reply("first");
    assert_eq!(test.table.unclaimed(), Unclaimed { repeated: 1, other: 1 });
}

#[test]
fn a_kind_that_is_no_reply_ends_nothing() {
    let mut test = TestTable::new();
    test.connect();
    test.start("a", 1000);
    test.actions();
    let progress = Status { id: id("a") };
    test.table.handle_message(envelope(&progress), test.now);
    assert_eq!(test.actions(), NOTHING);
    assert_eq!(test.table.unclaimed(), Unclaimed::default());
}

#[test]
fn a_farm_that_was_never_reached_is_given_up_after_the_connect_timeout() {
    let mut test = TestTable::new();
    test.start("long", 60_000);
    test.start("short", 1000);
    test.wait(1250);
    assert_eq!(test.actions(), ["finish short: TimedOut"]);
    test.wait(1750);
    assert_eq!(test.actions(), ["finish long: Unreachable"]);
}

#[test]
fn a_farm_that_was_reached_before_is_waited_for_until_the_deadline() {
    let mut test = TestTable::new();
    test.start("a", 10_000);
    test.connect();
    test.table.handle_disconnected();
    test.actions();
    test.wait(10_249);
    assert_eq!(test.actions(), NOTHING);
    assert_eq!(test.table.poll_timeout(), Some(test.now + Duration::from_millis(1)));
    test.wait(1);
    assert_eq!(test.actions(), ["finish a: TimedOut"]);
    assert_eq!(test.table.poll_timeout(), None);
}

#[test]
fn a_request_whose_time_ran_out_is_not_sent_any_more() {
    let mut test = TestTable::new();
    test.connect();
    test.table.handle_disconnected();
    test.start("a", 100);
    test.now += Duration::from_millis(100);
    test.connect();
    assert_eq!(test.actions(), NOTHING);
    test.wait(250);
    assert_eq!(test.actions(), ["finish a: TimedOut"]);
}

#[test]
fn a_refused_message_is_offered_again_soon() {
    let mut test = TestTable::new();
    test.connect();
    test.start("a", 1000);
    test.actions();
    test.table.handle_refused(&id("a"), test.now);
    assert_eq!(test.table.poll_timeout(), Some(test.now + REFUSED_PAUSE));
    test.wait(19);
    assert_eq!(test.actions(), NOTHING);
    test.wait(1);
    assert_eq!(test.actions(), ["send a with 980 ms"]);
}

#[test]
fn a_refused_message_whose_time_ran_out_wakes_nobody_before_its_end() {
    let mut test = TestTable::new();
    test.connect();
    test.start("a", 10);
    test.actions();
    test.table.handle_refused(&id("a"), test.now);
    test.wait(20);
    assert_eq!(test.actions(), NOTHING);
    let end = GRACE.checked_sub(Duration::from_millis(10)).unwrap();
    assert_eq!(test.table.poll_timeout(), Some(test.now + end));
    test.wait(240);
    assert_eq!(test.actions(), ["finish a: TimedOut"]);
}

#[test]
fn an_encode_that_was_refused_as_too_much_is_sent_again_a_few_times() {
    let mut test = TestTable::new();
    test.connect();
    test.start("a", 60_000);
    for retry in 0..RETRIES_MAX {
        assert_eq!(test.actions().len(), 1, "{retry}");
        test.overload("a");
        assert_eq!(test.actions(), NOTHING);
        let pause = test.table.poll_timeout().unwrap() - test.now;
        let advice = Duration::from_millis(100 << retry);
        assert!(pause >= advice / 2 && pause <= advice * 3 / 2, "{pause:?}");
        test.now += pause;
        test.table.handle_timeout(test.now);
    }
    test.actions();
    test.overload("a");
    assert_eq!(test.actions(), ["finish a: reply"]);
}

#[test]
fn what_has_no_time_left_or_is_no_encode_is_not_sent_again() {
    let mut test = TestTable::new();
    test.connect();
    test.start("a", 40);
    test.plain("status", 60_000);
    test.actions();
    test.overload("a");
    test.overload("status");
    assert_eq!(test.actions(), ["finish a: reply", "finish status: reply"]);
}

#[test]
fn cancelling_tells_the_farm_only_what_it_may_be_working_on() {
    let mut test = TestTable::new();
    test.start("unsent", 1000);
    test.cancel("unsent");
    test.connect();
    test.start("sent", 1000);
    test.plain("plain", 1000);
    assert_eq!(test.actions(), ["send sent with 1000 ms", "send plain"]);

    test.cancel("plain");
    test.cancel("sent");
    test.cancel("sent");
    assert_eq!(test.actions(), ["send cancel of sent"]);
    test.fail("sent");
    test.wait(5000);
    assert_eq!(test.actions(), NOTHING);
    assert_eq!(test.table.unclaimed(), Unclaimed { repeated: 0, other: 1 });
}

#[test]
fn waiting_for_the_connection_is_a_request_that_sends_nothing() {
    let mut test = TestTable::new();
    test.connection("early");
    test.connect();
    test.connection("late");
    assert_eq!(test.actions(), ["finish early: Connected", "finish late: Connected"]);
}

#[test]
fn the_table_is_bounded() {
    let mut test = TestTable::new();
    for number in 0..OPEN_MAX {
        test.plain(&format!("r{number}"), 1000);
    }
    assert_eq!(test.actions(), NOTHING);
    test.plain("more", 1000);
    assert_eq!(test.actions(), ["finish more: Full"]);
}

#[derive(Debug, Clone)]
enum Operation {
    Start { timeout_ms: u64, is_encode: bool },
    Connection,
    Connect,
    Disconnect,
    Reply(usize),
    Fail(usize),
    Overload(usize),
    Refuse(usize),
    TooLarge(usize),
    Cancel(usize),
    Wait(u64),
}

fn operation() -> impl Strategy<Value = Operation> {
    let which = || 0..30_usize;
    prop_oneof![
        4 => (1..8000_u64, any::<bool>())
            .prop_map(|(timeout_ms, is_encode)| Operation::Start { timeout_ms, is_encode }),
        1 => Just(Operation::Connection),
        2 => Just(Operation::Connect),
        1 => Just(Operation::Disconnect),
        3 => which().prop_map(Operation::Reply),
        1 => which().prop_map(Operation::Fail),
        1 => which().prop_map(Operation::Overload),
        1 => which().prop_map(Operation::Refuse),
        1 => which().prop_map(Operation::TooLarge),
        1 => which().prop_map(Operation::Cancel),
        3 => (0..3000_u64).prop_map(Operation::Wait),
    ]
}

proptest! {
    #[test]
    fn every_request_has_exactly_one_outcome_in_time(
        operations in prop::collection::vec(operation(), 0..60),
    ) {
        let mut test = TestTable::new();
        let mut deadlines: BTreeMap<RequestId, Instant> = BTreeMap::new();
        let mut cancelled = BTreeSet::new();
        let mut finished = BTreeMap::new();
        for (number, operation) in operations.into_iter().enumerate() {
            let name = |number: usize| format!("r{number}");
            match operation {
                Operation::Start { timeout_ms, is_encode } => {
                    let deadline = test.now + Duration::from_millis(timeout_ms);
                    deadlines.insert(id(&name(number)), deadline);
                    if is_encode {
                        test.start(&name(number), timeout_ms);
                    } else {
                        test.plain(&name(number), timeout_ms);
                    }
                }
                Operation::Connection => {
                    deadlines.insert(id(&name(number)), test.now + CONNECT);
                    test.connection(&name(number));
                }
                Operation::Connect => test.connect(),
                Operation::Disconnect => test.table.handle_disconnected(),
                Operation::Reply(which) => test.reply(&name(which)),
                Operation::Overload(which) => test.overload(&name(which)),
                Operation::Fail(which) => test.fail(&name(which)),
                Operation::Refuse(which) => test.table.handle_refused(&id(&name(which)), test.now),
                Operation::TooLarge(which) => test.table.handle_too_large(&id(&name(which))),
                Operation::Cancel(which) => {
                    let which = id(&name(which));
                    if deadlines.contains_key(&which) && !finished.contains_key(&which) {
                        cancelled.insert(which.clone());
                    }
                    test.table.cancel(&which, id("cancel"));
                }
                Operation::Wait(ms) => test.wait(ms),
            }
            take(&mut test, &mut finished)?;
            for (id, deadline) in &deadlines {
                let is_done = finished.contains_key(id) || cancelled.contains(id);
                prop_assert!(is_done || test.now < *deadline + GRACE, "{id} is late");
            }
        }
        test.wait(60_000);
        take(&mut test, &mut finished)?;
        prop_assert_eq!(test.table.poll_timeout(), None);
        for id in deadlines.keys() {
            prop_assert_ne!(finished.contains_key(id), cancelled.contains(id), "{}", id);
        }
    }
}

/// Notes the outcomes, each of which must be the first for its request.
fn take(
    test: &mut TestTable,
    finished: &mut BTreeMap<RequestId, Outcome>,
) -> Result<(), TestCaseError> {
    while let Some(action) = test.table.poll_action() {
        if let Action::Finish { id, outcome } = action {
            let previous = finished.insert(id.clone(), outcome);
            prop_assert!(previous.is_none(), "{} was finished twice", id);
        }
    }
    Ok(())
}

const NOTHING: [&str; 0] = [];

struct TestTable {
    table: Table,
    now: Instant,
}

impl TestTable {
    #[expect(clippy::disallowed_methods, reason = "some instant to count from")]
    fn new() -> Self {
        Self { table: Table::new(CONNECT), now: Instant::now() }
    }

    fn start(&mut self, name: &str, timeout_ms: u64) {
        let request = ClipEncode {
            id: id(name),
            model: "sd15".parse().unwrap(),
            model_digest: None,
            prompts: Vec::new(),
            stack: Vec::new(),
            options: EncodeOptions::default(),
            budget_ms: None,
            no_cache: false,
            requires: Vec::new(),
        };
        self.ask(name, Ask::Encode(Box::new(request), Vec::new()), timeout_ms);
    }

    fn plain(&mut self, name: &str, timeout_ms: u64) {
        let header = header::write(&Status { id: id(name) }).into();
        self.ask(name, Ask::Plain(header, Vec::new()), timeout_ms);
    }

    fn connection(&mut self, name: &str) {
        self.ask(name, Ask::Connection, 3000);
    }

    fn ask(&mut self, name: &str, ask: Ask, timeout_ms: u64) {
        let timeout = Duration::from_millis(timeout_ms);
        self.table.start(Start { id: id(name), ask, timeout }, self.now);
    }

    fn connect(&mut self) {
        self.table.handle_connected(self.now);
    }

    fn cancel(&mut self, name: &str) {
        self.table.cancel(&id(name), id("cancel"));
    }

    fn wait(&mut self, ms: u64) {
        self.now += Duration::from_millis(ms);
        self.table.handle_timeout(self.now);
    }

    fn reply(&mut self, name: &str) {
        let reply = CancelReply { id: id(name), cancelled: true };
        self.table.handle_message(envelope(&reply), self.now);
    }

    fn fail(&mut self, name: &str) {
        let reply = Failure::new(ErrorCode::Cancelled, "it was cancelled");
        self.table.handle_message(envelope(&reply.into_reply(Some(id(name)))), self.now);
    }

    fn overload(&mut self, name: &str) {
        let failure = Failure::new(ErrorCode::Overloaded, "the queue is full");
        let failure = Failure { retry_after_ms: Some(100), ..failure };
        self.table.handle_message(envelope(&failure.into_reply(Some(id(name)))), self.now);
    }

    fn actions(&mut self) -> Vec<String> {
        std::iter::from_fn(|| self.table.poll_action()).map(|action| shown(&action)).collect()
    }
}

fn shown(action: &Action) -> String {
    match action {
        Action::Finish { id, outcome: Outcome::Reply(_) } => format!("finish {id}: reply"),
        Action::Finish { id, outcome } => format!("finish {id}: {outcome:?}"),
        Action::Send { request, frames } => {
            let envelope = Envelope::open(frames.clone()).unwrap();
            if envelope.is::<Cancel>() {
                return format!("send cancel of {}", envelope.read::<Cancel>().unwrap().request);
            }
            let id = request.as_ref().unwrap();
            match envelope.read::<ClipEncode>() {
                Ok(encode) => format!("send {id} with {} ms", encode.budget_ms.unwrap()),
                Err(_) => format!("send {id}"),
            }
        }
    }
}

fn envelope<H: protocol::Header>(header: &H) -> Envelope {
    Envelope::open(frames::frames(header, Vec::new())).unwrap()
}

fn id(name: &str) -> RequestId {
    name.parse().unwrap()
}
