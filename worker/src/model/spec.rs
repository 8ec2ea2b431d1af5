//! Which files make a model: `NAME=FAMILY:FILE[,FILE]` on the command line.

use std::{fmt, path::PathBuf, str::FromStr};

use protocol::{Family, InvalidId, ModelName, UnknownFamily};

/// A model to load.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelSpec {
    /// What people will call it.
    pub name: ModelName,
    /// Which components it has.
    pub family: Family,
    /// One checkpoint or stand-alone encoder, or one stand-alone encoder for every component.
    pub files: Vec<PathBuf>,
}

/// A text that does not say which model to load.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidSpec {
    /// No `=` or no `:`.
    #[error("`{0}` is not a model: expected `NAME=FAMILY:FILE` or `NAME=FAMILY:FILE,FILE`")]
    Form(String),
    /// The part before `=` is not a name.
    #[error(transparent)]
    Name(#[from] InvalidId),
    /// The part before `:` is not a family.
    #[error(transparent)]
    Family(#[from] UnknownFamily),
    /// No file, an empty file name, or more files than components.
    #[error("model `{name}` names {found} files: family `{family}` takes 1 to {most}")]
    Files {
        /// The model.
        name: ModelName,
        /// Its family.
        family: Family,
        /// Files in the text.
        found: usize,
        /// Components of the family.
        most: usize,
    },
}

impl ModelSpec {
    /// A model of these files.
    ///
    /// # Errors
    /// When there are no files, or more than the family has components.
    pub fn new(name: ModelName, family: Family, files: Vec<PathBuf>) -> Result<Self, InvalidSpec> {
        let (found, most) = (files.len(), family.components().len());
        if found == 0 || found > most {
            return Err(InvalidSpec::Files { name, family, found, most });
        }
        Ok(Self { name, family, files })
    }
}

impl FromStr for ModelSpec {
    type Err = InvalidSpec;

    fn from_str(text: &str) -> Result<Self, InvalidSpec> {
        let form = || InvalidSpec::Form(text.to_owned());
        let (name, rest) = text.split_once('=').ok_or_else(form)?;
        let (family, files) = rest.split_once(':').ok_or_else(form)?;
        let (name, family) = (name.parse::<ModelName>()?, family.parse::<Family>()?);
        let files = files.split(',').filter(|file| !file.is_empty()).map(PathBuf::from);
        Self::new(name, family, files.collect())
    }
}

impl fmt::Display for ModelSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}={}:", self.name, self.family)?;
        for (index, file) in self.files.iter().enumerate() {
            write!(f, "{}{}", if index == 0 { "" } else { "," }, file.display())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spec_reads_back_from_its_text() {
        for text in ["sd=sd15:/m/clip_l.safetensors", "xl=sdxl:C:/l.safetensors,g.safetensors"] {
            assert_eq!(text.parse::<ModelSpec>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn a_wrong_spec_says_what_is_wrong() {
        let error = |text: &str| text.parse::<ModelSpec>().unwrap_err().to_string();
        assert!(error("clip_l.safetensors").contains("expected `NAME=FAMILY:FILE`"));
        assert!(error("a=sd3:x").contains("`sd3`"));
        assert_eq!(error("a=sd15:x,y"), "model `a` names 2 files: family `sd15` takes 1 to 1");
        assert_eq!(error("a=sd15:"), "model `a` names 0 files: family `sd15` takes 1 to 1");
    }
}
