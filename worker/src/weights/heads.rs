//! What a file of weights does not say: the number of heads and the activation.
//!
//! A configuration beside the file says it in Hugging Face's words (`num_attention_heads`,
//! `hidden_act`), on its top level, under `text_config`, or, for files with several encoders, under
//! the component's name. `<file stem>.config.json` is asked before `config.json`. One that is about
//! another encoder (its `hidden_size` differs) or does not speak of heads is passed over; then the
//! two published widths speak for themselves.

use std::{
    fs::File,
    io::Read,
    path::{Path, PathBuf},
};

use protocol::Component;
use serde::Deserialize;

use super::error::LoadError;
use crate::model::Activation;

/// Bytes of a configuration; real ones have a few thousand.
const CONFIG_BYTES_MAX: u64 = 1 << 20;

/// Heads and activation of an encoder that is `hidden` wide.
pub(super) fn heads_and_activation(
    file: &Path,
    component: Component,
    hidden: usize,
) -> Result<(usize, Activation), LoadError> {
    for path in config_paths(file) {
        let Some(config) = read(&path)? else { continue };
        if let Some(answer) = config.answer(component, hidden, &path)? {
            return Ok(answer);
        }
    }
    match hidden {
        768 => Ok((12, Activation::QuickGelu)),
        1280 => Ok((20, Activation::Gelu)),
        _ => Err(LoadError::UnknownWidth { file: file.to_owned(), component, hidden }),
    }
}

fn config_paths(file: &Path) -> [PathBuf; 2] {
    [file.with_extension("config.json"), file.with_file_name("config.json")]
}

#[derive(Debug, Deserialize)]
struct Config {
    #[serde(flatten)]
    own: Encoder,
    #[serde(rename = "text_config")]
    text: Option<Encoder>,
    clip_l: Option<Encoder>,
    clip_g: Option<Encoder>,
}

#[derive(Debug, Deserialize)]
struct Encoder {
    hidden_size: Option<usize>,
    num_attention_heads: Option<usize>,
    hidden_act: Option<String>,
}

fn read(path: &Path) -> Result<Option<Config>, LoadError> {
    let fail = |reason: String| LoadError::Config { config: path.to_owned(), reason };
    let unreadable = |source| LoadError::ConfigUnreadable { config: path.to_owned(), source };
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(unreadable(source)),
    };
    let mut text = Vec::new();
    let read = file.take(CONFIG_BYTES_MAX + 1).read_to_end(&mut text);
    read.map_err(unreadable)?;
    if text.len() as u64 > CONFIG_BYTES_MAX {
        return Err(fail(format!("is larger than {CONFIG_BYTES_MAX} bytes")));
    }
    let config = serde_json::from_slice(&text);
    config.map(Some).map_err(|error| fail(format!("is not a model configuration: {error}")))
}

impl Config {
    fn answer(
        &self,
        component: Component,
        hidden: usize,
        path: &Path,
    ) -> Result<Option<(usize, Activation)>, LoadError> {
        let fail = |reason: String| LoadError::Config { config: path.to_owned(), reason };
        let named = match component {
            Component::ClipL => &self.clip_l,
            Component::ClipG => &self.clip_g,
        };
        let sections = [named.as_ref(), self.text.as_ref(), Some(&self.own)];
        let fits = |encoder: &&Encoder| encoder.hidden_size.is_none_or(|size| size == hidden);
        let Some(encoder) = sections
            .into_iter()
            .flatten()
            .filter(|encoder| encoder.num_attention_heads.is_some())
            .find(fits)
        else {
            return Ok(None);
        };
        let heads = encoder.num_attention_heads.unwrap_or(0);
        if heads == 0 || hidden == 0 || !hidden.is_multiple_of(heads) {
            return Err(fail(format!("`num_attention_heads` {heads} does not divide {hidden}")));
        }
        let activation = match encoder.hidden_act.as_deref() {
            Some("quick_gelu") => Activation::QuickGelu,
            Some("gelu") => Activation::Gelu,
            Some(other) => {
                return Err(fail(format!(
                    "`hidden_act` is `{other}`: expected `quick_gelu` or `gelu`"
                )));
            }
            None => return Err(fail("`hidden_act` is missing".to_owned())),
        };
        Ok(Some((heads, activation)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn published_widths_need_no_configuration() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("clip.safetensors");
        let ask = |hidden| heads_and_activation(&file, Component::ClipL, hidden);
        assert_eq!(ask(768).unwrap(), (12, Activation::QuickGelu));
        assert_eq!(ask(1280).unwrap(), (20, Activation::Gelu));
        assert!(ask(32).unwrap_err().to_string().contains("put a `config.json`"));
    }

    #[test]
    fn a_configuration_of_the_same_stem_goes_first() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("clip.safetensors");
        let write =
            |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
        let ask = || heads_and_activation(&file, Component::ClipG, 48);

        write("config.json", r#"{"num_attention_heads": 4, "hidden_act": "gelu"}"#);
        assert_eq!(ask().unwrap(), (4, Activation::Gelu));

        write(
            "clip.config.json",
            r#"{"clip_g": {"num_attention_heads": 6, "hidden_act": "quick_gelu"}}"#,
        );
        assert_eq!(ask().unwrap(), (6, Activation::QuickGelu));

        write("clip.config.json", r#"{"hidden_size": 32, "num_attention_heads": 8}"#);
        assert_eq!(ask().unwrap(), (4, Activation::Gelu), "a config of another width was used");
    }

    #[test]
    fn a_configuration_that_cannot_be_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("clip.safetensors");
        for (text, reason) in [
            (r#"{"num_attention_heads": 5, "hidden_act": "gelu"}"#, "does not divide 48"),
            (r#"{"num_attention_heads": 0, "hidden_act": "gelu"}"#, "does not divide 48"),
            (r#"{"num_attention_heads": 6, "hidden_act": "relu"}"#, "`relu`"),
            (r#"{"num_attention_heads": 6}"#, "`hidden_act` is missing"),
            ("[]", "not a model configuration"),
        ] {
            std::fs::write(folder.path().join("config.json"), text).unwrap();
            let error = heads_and_activation(&file, Component::ClipG, 48).unwrap_err();
            assert!(error.to_string().contains(reason), "{text}: {error}");
        }
    }
}
