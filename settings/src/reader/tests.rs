//! Precedence, mistakes and descriptions, from all sources at once.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::Path;

use crate::{Origin, Settings, accept, at_least, within};

use super::*;

#[test]
fn the_command_line_beats_the_environment_beats_the_file_beats_the_default() {
    let file = file("[broker]\nport = 1\n");
    let with_file = Settings::new(&["broker"]).file(file.path());
    let with_env = with_file.clone().env("LUNA", vars(&[("LUNA_BROKER_PORT", "2")]));
    let with_flag = with_env.clone().set("broker.port", 3);
    let origin = Origin::File(file.path().to_owned());
    let variable = Origin::Environment("LUNA_BROKER_PORT".to_owned());
    for (settings, port, origin) in [
        (Settings::new(&["broker"]), 0, Origin::Default),
        (with_file, 1, origin),
        (with_env, 2, variable),
        (with_flag, 3, Origin::CommandLine),
    ] {
        let mut reader = settings.reader();
        assert_eq!(reader.get("broker.port", "", 0, accept), port);
        assert_eq!(reader.entries()[0].origin, origin);
        assert_eq!(reader.finish(), Ok(()));
    }
}

#[test]
fn a_later_file_overrides_an_earlier_one() {
    let (first, second) = (file("[a]\nx = 1\ny = 1\n"), file("[a]\ny = 2\n"));
    let mut reader = Settings::new(&["a"]).file(first.path()).file(second.path()).reader();
    assert_eq!((reader.get("a.x", "", 0, accept), reader.get("a.y", "", 0, accept)), (1, 2));
    assert_eq!(reader.finish(), Ok(()));
}

#[test]
fn all_mistakes_are_reported_at_once_with_key_value_source_and_reason() {
    let file = file("[broker]\nport = 70000\nqueue_max = 0\nqeue_max = 7\nratio = 'high'\n");
    let path = file.path().display();
    let settings = Settings::new(&["broker"])
        .file(file.path())
        .file(Path::new("/nonexistent/luna.toml"))
        .env("LUNA", vars(&[("LUNA_BROKER_READY", "maybe"), ("LUNA_BROKER_PROT", "1")]))
        .set("broker.workers", -1);
    let mut reader = settings.reader();
    assert_eq!(reader.get("broker.port", "", 19283_u16, accept), 19283);
    assert_eq!(reader.get("broker.queue_max", "", 512, at_least(1)), 512);
    assert!((reader.get("broker.ratio", "", 0.5, accept) - 0.5_f64).abs() < f64::EPSILON);
    assert!(reader.get("broker.ready", "", true, accept));
    assert_eq!(reader.get("broker.workers", "", 2_u32, within(1..=64)), 2);
    let expected = format!(
        "8 mistakes in the settings:\n\
         - file `/nonexistent/luna.toml`: No such file or directory (os error 2)\n\
         - `broker.port` is \"70000\" (file `{path}`): not a `u16`: number too large to fit in \
           target type\n\
         - `broker.queue_max` is \"0\" (file `{path}`): write at least 1\n\
         - `broker.ratio` is \"high\" (file `{path}`): not a `f64`: invalid float literal\n\
         - `broker.ready` is \"maybe\" (environment variable LUNA_BROKER_READY): not a `bool`: \
           provided string was not `true` or `false`\n\
         - `broker.workers` is \"-1\" (command line): not a `u32`: invalid digit found in string\n\
         - `broker.qeue_max` is \"7\" (file `{path}`): unknown key; did you mean \
           `broker.queue_max`?\n\
         - environment variable LUNA_BROKER_PROT: unknown variable \"1\"; did you mean \
           LUNA_BROKER_PORT?"
    );
    assert_eq!(reader.finish().unwrap_err().to_string(), expected);
}

#[test]
fn sections_of_other_processes_are_left_alone_and_unknown_ones_are_not() {
    let file = file("[broker]\nport = 1\n[worker]\nanything = 1\n[wroker]\nid = 1\n");
    let mut reader = Settings::new(&["broker", "worker"]).file(file.path()).reader();
    reader.get("broker.port", "", 0, accept);
    let errors = reader.finish().unwrap_err();
    assert_eq!(errors.mistakes().len(), 1);
    assert_eq!(errors.mistakes()[0].key.as_deref(), Some("wroker.id"));
}

#[test]
fn an_integer_is_not_made_of_a_float_nor_a_value_of_a_list() {
    let file = file("[a]\nfloat = 1.0\nlist = [1, 2]\n");
    let mut reader = Settings::new(&["a"]).file(file.path()).reader();
    reader.get("a.float", "", 0_u32, accept);
    reader.get("a.list", "", 0_u32, accept);
    let errors = reader.finish().unwrap_err();
    let reasons: Vec<&str> = errors.mistakes().iter().map(|it| it.reason.as_str()).collect();
    let expected = ["not a `u32`: invalid digit found in string", "write one value, not a list"];
    assert_eq!(reasons, expected);
}

#[test]
fn lists_and_tables_come_from_files_and_from_text() {
    let file = file("[worker]\ndevices = [0, 2]\n[worker.models]\na = 'one'\nb = 'two'\n");
    let in_file = Settings::new(&["worker"]).file(file.path());
    let vars = [("LUNA_WORKER_DEVICES", "3, 4"), ("LUNA_WORKER_MODELS", "c=three=3")];
    let in_env = in_file.clone().env("LUNA", self::vars(&vars));
    for (settings, devices, models) in [
        (in_file, vec![0, 2], vec![("a", "one"), ("b", "two")]),
        (in_env, vec![3, 4], vec![("c", "three=3")]),
        (Settings::new(&["worker"]), vec![9], vec![]),
    ] {
        let mut reader = settings.reader();
        assert_eq!(reader.get_list("worker.devices", "", vec![9], accept), devices);
        let table: BTreeMap<String, String> = reader.get_table("worker.models", "", accept);
        let models = models.into_iter().map(|(name, value)| (name.to_owned(), value.to_owned()));
        assert_eq!(table, models.collect());
        assert_eq!(reader.finish(), Ok(()));
    }
}

#[test]
fn one_bad_item_names_its_row() {
    let file = file("[w]\nlist = ['1', 'x']\n[w.rows]\na = 1\nb = 'y'\n");
    let mut reader = Settings::new(&["w"]).file(file.path()).reader();
    reader.get_list("w.list", "", vec![0_u8], accept);
    let rows: BTreeMap<String, u8> = reader.get_table("w.rows", "", accept);
    assert_eq!(rows, BTreeMap::from([("a".to_owned(), 1)]));
    let errors = reader.finish().unwrap_err();
    let keys: Vec<_> = errors.mistakes().iter().map(|it| it.key.as_deref()).collect();
    assert_eq!(keys, [Some("w.list"), Some("w.rows.b")]);
}

#[test]
fn optional_flags_and_values_may_be_absent() {
    let settings = Settings::new(&["a"]).set_if("a.x", Some(5)).set_if("a.y", None::<u8>);
    let mut reader = settings.reader();
    assert_eq!(reader.get_optional("a.x", "", accept), Some(5));
    assert_eq!(reader.get_optional::<u8>("a.y", "", accept), None);
    reader.reject("a.x", "excludes `a.y`");
    let error = reader.finish().unwrap_err().to_string();
    assert!(error.ends_with("- `a.x` is \"5\" (command line): excludes `a.y`"), "{error}");
}

#[test]
fn foreign_empty_and_unreadable_variables() {
    let unreadable = (OsString::from("LUNA_A_X"), OsString::from_vec(vec![0xFF]));
    let vars = vars(&[("LUNAR_A_X", "1"), ("LUNA_A_Y", ""), ("LUNA_BROKER_SERVICE_HOST", "h")]);
    let mut reader =
        Settings::new(&["a"]).env("LUNA", vars.into_iter().chain([unreadable])).reader();
    assert_eq!((reader.get("a.x", "", 7, accept), reader.get("a.y", "", 8, accept)), (7, 8));
    let error = reader.finish().unwrap_err().to_string();
    assert_eq!(error, "1 mistake in the settings:\n- environment variable LUNA_A_X: not UTF-8");
}

#[test]
fn the_reference_and_the_effective_settings_are_toml() {
    let settings = Settings::new(&["broker", "log"]).env("LUNA", []).set("broker.port", 7);
    let mut reader = settings.reader();
    reader.get("broker.port", "TCP port", 19283, accept);
    reader.get("log.format", "text or json", "text".to_owned(), accept);
    reader.get_optional::<String>("broker.name", "shown in logs", accept);
    assert_eq!(
        reader.reference(),
        "[broker]\n# TCP port (LUNA_BROKER_PORT)\n# port = 19283\n\
         # shown in logs (LUNA_BROKER_NAME)\n# name = …\n\n\
         [log]\n# text or json (LUNA_LOG_FORMAT)\n# format = \"text\"\n"
    );
    let effective = reader.effective();
    assert_eq!(
        effective,
        "[broker]\nport = 7 # command line\n# name is not set\n\n\
         [log]\nformat = \"text\" # default\n"
    );
    let file = file(&effective);
    let mut again = Settings::new(&["broker", "log"]).file(file.path()).reader();
    assert_eq!(again.get("broker.port", "", 0, accept), 7);
}

fn file(text: &str) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), text).unwrap();
    file
}

fn vars(vars: &[(&str, &str)]) -> Vec<(OsString, OsString)> {
    vars.iter().map(|(name, value)| (name.into(), value.into())).collect()
}
