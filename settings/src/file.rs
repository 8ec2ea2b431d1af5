//! One TOML file, flattened to dotted keys.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use config::{FileFormat, Map, Source, Value, ValueKind};

/// Far more than any configuration needs.
const FILE_BYTES_MAX: u64 = 1024 * 1024;

/// What one file says.
#[derive(Clone, Debug)]
pub(crate) struct FileLayer {
    pub(crate) path: PathBuf,
    /// By dotted key. A key may itself contain dots: it then means the nested one.
    pub(crate) values: BTreeMap<String, Text>,
}

/// A value in text form.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Text {
    One(String),
    List(Vec<String>),
}

impl FileLayer {
    /// Reads the file at `path`, or says why not.
    pub(crate) fn read(path: &Path) -> Result<Self, String> {
        let mut text = String::new();
        let file = File::open(path).map_err(|error| error.to_string())?;
        let read = file.take(FILE_BYTES_MAX + 1).read_to_string(&mut text);
        read.map_err(|error| error.to_string())?;
        if text.len() as u64 > FILE_BYTES_MAX {
            return Err(format!("the file is larger than {FILE_BYTES_MAX} bytes"));
        }
        Self::parse(path, &text)
    }

    fn parse(path: &Path, text: &str) -> Result<Self, String> {
        let table = config::File::from_str(text, FileFormat::Toml).collect();
        let table = table.map_err(|error| error.to_string().trim_end().to_owned())?;
        let mut values = BTreeMap::new();
        flatten("", table, &mut values)?;
        Ok(Self { path: path.to_owned(), values })
    }
}

impl Text {
    /// Shows the value as it would stand on a command line.
    pub(crate) fn show(&self) -> String {
        match self {
            Self::One(text) => text.clone(),
            Self::List(texts) => texts.join(","),
        }
    }
}

fn flatten(
    prefix: &str,
    table: Map<String, Value>,
    values: &mut BTreeMap<String, Text>,
) -> Result<(), String> {
    for (name, value) in table {
        let key = if prefix.is_empty() { name } else { format!("{prefix}.{name}") };
        if let ValueKind::Table(inner) = value.kind {
            flatten(&key, inner, values)?;
        } else {
            let text = text(&key, value.kind)?;
            if values.insert(key.clone(), text).is_some() {
                return Err(format!("`{key}` is written twice"));
            }
        }
    }
    Ok(())
}

fn text(key: &str, value: ValueKind) -> Result<Text, String> {
    let ValueKind::Array(items) = value else { return Ok(Text::One(scalar(key, value)?)) };
    let items = items.into_iter().map(|item| scalar(key, item.kind));
    Ok(Text::List(items.collect::<Result<_, _>>()?))
}

fn scalar(key: &str, value: ValueKind) -> Result<String, String> {
    match value {
        ValueKind::String(text) => Ok(text),
        ValueKind::Boolean(value) => Ok(value.to_string()),
        ValueKind::I64(value) => Ok(value.to_string()),
        ValueKind::I128(value) => Ok(value.to_string()),
        ValueKind::U64(value) => Ok(value.to_string()),
        ValueKind::U128(value) => Ok(value.to_string()),
        // With its point, so that `1.0` does not pass for an integer.
        ValueKind::Float(value) => Ok(format!("{value:?}")),
        ValueKind::Nil | ValueKind::Table(_) | ValueKind::Array(_) => {
            Err(format!("`{key}` has a list of lists or tables: write a list of plain values"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_become_dotted_keys_and_values_become_text() {
        let layer = parse(
            "top = 1_000\n[broker]\nport = 19283\nratio = 1.0\nready = true\n\
             [worker.models]\nanime = \"sdxl:/models/a.safetensors\"\n\
             [client]\nendpoints = ['tcp://a:1', 'tcp://b:1']\n",
        );
        let values: Vec<(String, String)> =
            layer.unwrap().values.into_iter().map(|(key, text)| (key, text.show())).collect();
        let expected = [
            ("broker.port", "19283"),
            ("broker.ratio", "1.0"),
            ("broker.ready", "true"),
            ("client.endpoints", "tcp://a:1,tcp://b:1"),
            ("top", "1000"),
            ("worker.models.anime", "sdxl:/models/a.safetensors"),
        ];
        assert_eq!(values, expected.map(|(key, text)| (key.to_owned(), text.to_owned())));
    }

    #[test]
    fn what_cannot_be_read_is_explained() {
        let error = parse("[broker]\nport = \n").unwrap_err();
        assert!(error.contains("line 2"), "{error}");
        let error = parse("[[worker.models]]\nname = 'a'\n").unwrap_err();
        assert!(error.contains("`worker.models`"), "{error}");
        let error = parse("\"a.b\" = 1\n[a]\nb = 2\n").unwrap_err();
        assert_eq!(error, "`a.b` is written twice");
    }

    fn parse(text: &str) -> Result<FileLayer, String> {
        FileLayer::parse(Path::new("luna.toml"), text)
    }
}
