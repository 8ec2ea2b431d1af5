//! Reading values: typed, checked, and never stopping at the first mistake.

use std::any::type_name;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Display;
use std::str::FromStr;

use crate::describe::{self, Entry};
use crate::file::Text;
use crate::mistake::{Mistake, Origin, SettingsErrors};
use crate::sources::Settings;
use crate::suggest::suggestion;

/// Reads values out of [`Settings`]. Each method declares a key; what was never declared is
/// unknown. After a mistake the default stands in, so that reading can go on:
/// nothing read may be used before [`Reader::finish`] has approved.
#[derive(Debug)]
pub struct Reader {
    settings: Settings,
    entries: Vec<Entry>,
    /// Declared keys under which a file may have rows of any name.
    tables: BTreeSet<String>,
    mistakes: Vec<Mistake>,
}

impl Reader {
    pub(crate) fn new(mut settings: Settings) -> Self {
        let mistakes = settings.take_mistakes();
        Self { settings, entries: Vec::new(), tables: BTreeSet::new(), mistakes }
    }

    /// Reads the value of `key`, or `default` if nobody wrote one.
    pub fn get<T>(
        &mut self,
        key: &str,
        help: &str,
        default: T,
        validate: impl Fn(&T) -> Result<(), String>,
    ) -> T
    where
        T: FromStr<Err: Display> + Display,
    {
        let text = Some(default.to_string());
        self.read(key, help, text, |text| one(text, &validate)).unwrap_or(default)
    }

    /// Reads the value of `key`, or nothing if nobody wrote one.
    pub fn get_optional<T>(
        &mut self,
        key: &str,
        help: &str,
        validate: impl Fn(&T) -> Result<(), String>,
    ) -> Option<T>
    where
        T: FromStr<Err: Display>,
    {
        self.read(key, help, None, |text| one(text, &validate))
    }

    /// Reads the values of `key`, each of which must pass `validate`: a list in a file, separated
    /// by commas elsewhere. `default` if nobody wrote any.
    pub fn get_list<T>(
        &mut self,
        key: &str,
        help: &str,
        default: Vec<T>,
        validate: impl Fn(&T) -> Result<(), String>,
    ) -> Vec<T>
    where
        T: FromStr<Err: Display> + Display,
    {
        let texts: Vec<String> = default.iter().map(T::to_string).collect();
        let parse = |text: &Text| match text {
            Text::One(text) => text.split(',').map(|item| parse(item.trim(), &validate)).collect(),
            Text::List(items) => items.iter().map(|item| parse(item, &validate)).collect(),
        };
        self.read(key, help, Some(texts.join(",")), parse).unwrap_or(default)
    }

    /// Reads the table `key`, whose rows may have any name: `[worker.models]` with
    /// `anime = "…"`. Outside files: `anime=…,photo=…`, which replaces the rows of files.
    pub fn get_table<T>(
        &mut self,
        key: &str,
        help: &str,
        validate: impl Fn(&T) -> Result<(), String>,
    ) -> BTreeMap<String, T>
    where
        T: FromStr<Err: Display>,
    {
        self.tables.insert(key.to_owned());
        if self.settings.lookup(key).is_some() {
            let parse = |text: &Text| rows(&text.show(), &validate);
            return self.read(key, help, Some(String::new()), parse).unwrap_or_default();
        }
        let mut table = BTreeMap::new();
        let mut shown = Vec::new();
        let mut table_origin = Origin::Default;
        for (name, (text, origin)) in self.settings.rows(key) {
            shown.push(format!("{name}={}", text.show()));
            table_origin = origin.clone();
            match one(&text, &validate) {
                Ok(value) => drop(table.insert(name, value)),
                Err(reason) => {
                    self.mistake(&format!("{key}.{name}"), text.show(), origin, reason);
                }
            }
        }
        self.declare(key, help, Some(String::new()), Some((shown.join(","), table_origin)));
        table
    }

    /// Adds a mistake that only shows when several values are seen together.
    pub fn reject(&mut self, key: &str, reason: impl Into<String>) {
        let entry = self.entries.iter().find(|entry| entry.key == key);
        let (value, origin) = match entry {
            Some(entry) => (entry.value.clone(), entry.origin.clone()),
            None => (None, Origin::Default),
        };
        let reason = reason.into();
        self.mistakes.push(Mistake { key: Some(key.to_owned()), value, origin, reason });
    }

    /// Returns what was declared so far.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// Writes every declared key with its help, variable and default as a commented TOML file.
    pub fn reference(&self) -> String {
        describe::reference(&self.entries)
    }

    /// Writes every declared key with the value in force and its source as a TOML file.
    pub fn effective(&self) -> String {
        describe::effective(&self.entries)
    }

    /// Ends the reading: every key that was written but never declared is a mistake too.
    ///
    /// An unknown environment variable is one only if it resembles a known one, because others
    /// put variables there as well.
    ///
    /// # Errors
    /// [`SettingsErrors`] with all mistakes.
    pub fn finish(mut self) -> Result<(), SettingsErrors> {
        let unknown: Vec<Mistake> = self.unknown_keys().chain(self.unknown_variables()).collect();
        self.mistakes.extend(unknown);
        if self.mistakes.is_empty() {
            Ok(())
        } else {
            Err(SettingsErrors { mistakes: self.mistakes })
        }
    }

    /// Looks `key` up and parses it; nothing if it is absent or, having noted that, mistaken.
    fn read<T>(
        &mut self,
        key: &str,
        help: &str,
        default: Option<String>,
        parse: impl Fn(&Text) -> Result<T, String>,
    ) -> Option<T> {
        let found = self.settings.lookup(key);
        let shown = found.as_ref().map(|(text, origin)| (text.show(), origin.clone()));
        self.declare(key, help, default, shown);
        let (text, origin) = found?;
        match parse(&text) {
            Ok(value) => Some(value),
            Err(reason) => {
                self.mistake(key, text.show(), origin, reason);
                None
            }
        }
    }

    fn declare(
        &mut self,
        key: &str,
        help: &str,
        default: Option<String>,
        found: Option<(String, Origin)>,
    ) {
        let (value, origin) = match found {
            Some((value, origin)) => (Some(value), origin),
            None => (default.clone(), Origin::Default),
        };
        let variable = self.settings.variable(key);
        let (key, help) = (key.to_owned(), help.to_owned());
        self.entries.push(Entry { key, variable, help, default, value, origin });
    }

    fn mistake(&mut self, key: &str, value: String, origin: Origin, reason: String) {
        let (key, value) = (Some(key.to_owned()), Some(value));
        self.mistakes.push(Mistake { key, value, origin, reason });
    }

    fn unknown_keys(&self) -> impl Iterator<Item = Mistake> {
        let unknown = self.settings.written_keys().filter(|(key, _, _)| !self.is_known(key));
        unknown.map(|(key, value, origin)| {
            let declared = self.entries.iter().map(|entry| entry.key.as_str());
            let reason = match suggestion(key, declared.chain(self.settings.sections())) {
                Some(meant) => format!("unknown key; did you mean `{meant}`?"),
                None => "unknown key; remove it".to_owned(),
            };
            Mistake { key: Some(key.to_owned()), value: Some(value), origin, reason }
        })
    }

    fn unknown_variables(&self) -> impl Iterator<Item = Mistake> {
        let known: BTreeSet<&str> =
            self.entries.iter().map(|entry| entry.variable.as_str()).collect();
        let unknown = self.settings.variables().filter({
            let known = known.clone();
            move |(name, _)| !known.contains(name)
        });
        unknown.filter_map(move |(name, value)| {
            let meant = suggestion(name, known.iter().copied())?;
            let origin = Origin::Environment(name.to_owned());
            let reason = format!("unknown variable {value:?}; did you mean {meant}?");
            Some(Mistake { key: None, value: None, origin, reason })
        })
    }

    /// Tells whether `key` was declared, lies in a declared table, or is another process's.
    fn is_known(&self, key: &str) -> bool {
        let is_declared = self.entries.iter().any(|entry| entry.key == key);
        let is_row = key.rsplit_once('.').is_some_and(|(table, _)| self.tables.contains(table));
        let section = section(key);
        let is_read = self.entries.iter().any(|entry| section_of(entry) == section);
        let is_foreign = !is_read && self.settings.sections().any(|known| Some(known) == section);
        is_declared || is_row || is_foreign
    }
}

fn section_of(entry: &Entry) -> Option<&str> {
    section(&entry.key)
}

fn section(key: &str) -> Option<&str> {
    key.split_once('.').map(|(section, _)| section)
}

fn one<T>(text: &Text, validate: impl Fn(&T) -> Result<(), String>) -> Result<T, String>
where
    T: FromStr<Err: Display>,
{
    match text {
        Text::One(text) => parse(text, validate),
        Text::List(_) => Err("write one value, not a list".to_owned()),
    }
}

fn rows<T>(
    text: &str,
    validate: impl Fn(&T) -> Result<(), String>,
) -> Result<BTreeMap<String, T>, String>
where
    T: FromStr<Err: Display>,
{
    let rows = text.split(',').filter(|row| !row.trim().is_empty()).map(|row| {
        let (name, value) =
            row.split_once('=').ok_or_else(|| format!("write `NAME=VALUE`, not `{row}`"))?;
        Ok((name.trim().to_owned(), parse(value.trim(), &validate)?))
    });
    rows.collect()
}

fn parse<T>(text: &str, validate: impl Fn(&T) -> Result<(), String>) -> Result<T, String>
where
    T: FromStr<Err: Display>,
{
    let value = text.parse().map_err(|error| match simple_name::<T>() {
        Some(name) => format!("not a `{name}`: {error}"),
        // Our own types say what to write.
        None => format!("{error}"),
    })?;
    validate(&value)?;
    Ok(value)
}

/// Returns the name of a primitive type, whose errors do not name it.
fn simple_name<T>() -> Option<&'static str> {
    Some(type_name::<T>()).filter(|name| !name.contains("::"))
}

#[cfg(test)]
mod tests;
