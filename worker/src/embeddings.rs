//! Textual-inversion files: vectors that stand in for a word of a prompt.
//!
//! Names are looked up as ComfyUI does: in the directory, then in its sub-directories; the exact
//! file, then the name with an extension. Only safetensors files are read: the other formats are
//! pickles, which can run code. A name never leaves the directory.

use std::{
    fs::{self, File},
    io::Read,
    path::{Component as PathPart, Path, PathBuf},
};

use prompt::{EmbeddingFailure, Embeddings};
use protocol::{Component, VectorTable};
use safetensors::{SafeTensors, tensor::TensorView};

use crate::weights::{float_dtype, widened};

/// Bytes of an embedding file; 75 vectors for both SDXL encoders are about 600 kB.
const FILE_BYTES_MAX: u64 = 64 << 20;

/// Vectors of one embedding; a prompt has room for 75 in every chunk.
const VECTORS_MAX: usize = 4096;

/// Sub-directories that are searched.
const DIRECTORIES_MAX: usize = 4096;

/// Extensions in ComfyUI's order. A file of the latter two is found, and refused.
const EXTENSIONS: [&str; 3] = ["safetensors", "pt", "bin"];

/// A directory of textual-inversion files.
#[derive(Debug, Clone)]
pub struct EmbeddingDirectory {
    root: PathBuf,
}

/// Why an embedding that is there cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum EmbeddingError {
    /// The name points out of the directory.
    #[error("embedding `{name}` is outside of the directory of embeddings")]
    Outside {
        /// The name.
        name: String,
    },
    /// The file is a pickle.
    #[error("embedding `{file}` is not safetensors: convert it, other formats can run code")]
    Pickle {
        /// The file.
        file: PathBuf,
    },
    /// The file cannot be read.
    #[error("embedding `{file}` cannot be read")]
    Read {
        /// The file.
        file: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
    /// The file or what is in it is too large.
    #[error("embedding `{file}` has more than {most} {unit}")]
    TooLarge {
        /// The file.
        file: PathBuf,
        /// What is accepted.
        most: u64,
        /// Of what.
        unit: &'static str,
    },
    /// The file is not safetensors inside.
    #[error("embedding `{file}` is not a safetensors file")]
    Header {
        /// The file.
        file: PathBuf,
        /// What the parser says.
        source: safetensors::SafeTensorError,
    },
    /// The tensor that holds the vectors does not hold vectors.
    #[error("embedding `{file}` has no usable vectors: {reason}")]
    Vectors {
        /// The file.
        file: PathBuf,
        /// What is wrong.
        reason: String,
    },
}

impl EmbeddingDirectory {
    /// The embeddings in and below `root`, which need not exist.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// The vectors of `name` for `component`, of whatever width they have; nothing if there is no
    /// such file.
    ///
    /// # Errors
    /// When the name points out of the directory, or the file is there and cannot be used.
    pub fn vectors(
        &self,
        name: &str,
        component: Component,
    ) -> Result<Option<VectorTable>, EmbeddingError> {
        let relative = Path::new(name);
        let stays_inside = |part| matches!(part, PathPart::Normal(_) | PathPart::CurDir);
        if !relative.components().all(stays_inside) {
            return Err(EmbeddingError::Outside { name: name.to_owned() });
        }
        if name.is_empty() || name.contains('\0') {
            return Ok(None);
        }
        match self.locate(relative)? {
            Some(file) => read(&file, component).map(Some),
            None => Ok(None),
        }
    }

    fn locate(&self, relative: &Path) -> Result<Option<PathBuf>, EmbeddingError> {
        for directory in self.directories()? {
            let exact = directory.join(relative);
            let mut candidates = vec![exact.clone()];
            candidates.extend(EXTENSIONS.map(|extension| {
                let mut name = exact.clone().into_os_string();
                name.push(".");
                name.push(extension);
                PathBuf::from(name)
            }));
            if let Some(file) = candidates.into_iter().find(|file| file.is_file()) {
                return Ok(Some(file));
            }
        }
        Ok(None)
    }

    /// The directory and all below it, in order; what cannot be listed is left out.
    fn directories(&self) -> Result<Vec<PathBuf>, EmbeddingError> {
        let mut directories = vec![self.root.clone()];
        let mut next = 0;
        while let Some(directory) = directories.get(next) {
            next += 1;
            let Ok(entries) = fs::read_dir(directory) else { continue };
            // Links to directories are not followed: they may form a circle.
            let below = entries.flatten().filter(|it| it.file_type().is_ok_and(|it| it.is_dir()));
            let mut below: Vec<PathBuf> = below.map(|entry| entry.path()).collect();
            below.sort();
            directories.extend(below);
            if directories.len() > DIRECTORIES_MAX {
                let (most, unit) = (DIRECTORIES_MAX as u64, "sub-directories");
                return Err(EmbeddingError::TooLarge { file: self.root.clone(), most, unit });
            }
        }
        Ok(directories)
    }
}

impl Embeddings for EmbeddingDirectory {
    fn find(
        &self,
        name: &str,
        component: Component,
    ) -> Result<Option<VectorTable>, EmbeddingFailure> {
        Ok(self.vectors(name, component)?)
    }
}

fn read(file: &Path, component: Component) -> Result<VectorTable, EmbeddingError> {
    if file.extension().is_none_or(|extension| extension != "safetensors") {
        return Err(EmbeddingError::Pickle { file: file.to_owned() });
    }
    let failed = |source| EmbeddingError::Read { file: file.to_owned(), source };
    let mut bytes = Vec::new();
    let opened = File::open(file).map_err(failed)?;
    opened.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > FILE_BYTES_MAX {
        let (most, unit) = (FILE_BYTES_MAX, "bytes");
        return Err(EmbeddingError::TooLarge { file: file.to_owned(), most, unit });
    }
    let tensors = SafeTensors::deserialize(&bytes)
        .map_err(|source| EmbeddingError::Header { file: file.to_owned(), source })?;
    table(&tensors, component, file)
}

/// The vectors of the tensors that are meant, one below the other.
fn table(
    tensors: &SafeTensors<'_>,
    component: Component,
    file: &Path,
) -> Result<VectorTable, EmbeddingError> {
    let unusable = |reason: String| EmbeddingError::Vectors { file: file.to_owned(), reason };
    let mut table = VectorTable::default();
    for (name, tensor) in chosen(tensors, component) {
        let width = match tensor.shape() {
            [width] | [_, width] if *width > 0 => *width,
            shape => return Err(unusable(format!("tensor `{name}` has shape {shape:?}"))),
        };
        if table.width != 0 && table.width != width {
            return Err(unusable(format!("vectors of {} and of {width} elements", table.width)));
        }
        table.width = width;
        let Some(dtype) = float_dtype(tensor.dtype()) else {
            return Err(unusable(format!("tensor `{name}` is {}", tensor.dtype())));
        };
        table.elements.extend(widened(dtype, tensor.data()));
    }
    if table.elements.is_empty() {
        return Err(unusable("it holds no tensor".to_owned()));
    }
    if !table.elements.iter().all(|element| element.is_finite()) {
        return Err(unusable("an element is not finite".to_owned()));
    }
    if table.rows() > VECTORS_MAX {
        let (most, unit) = (VECTORS_MAX as u64, "vectors");
        return Err(EmbeddingError::TooLarge { file: file.to_owned(), most, unit });
    }
    Ok(table)
}

/// The tensors that hold the vectors for `component`: the one of its name; else those bundled for
/// any encoder, else those bundled for this one; else the first of the file.
fn chosen<'a>(tensors: &SafeTensors<'a>, component: Component) -> Vec<(String, TensorView<'a>)> {
    let mut all: Vec<(String, TensorView<'a>)> = tensors.tensors();
    all.sort_by(|left, right| left.0.cmp(&right.0));
    if let Some(own) = all.iter().position(|(name, _)| name == component.as_str()) {
        return vec![all.swap_remove(own)];
    }
    for suffix in [".string_to_param.*".to_owned(), format!(".{component}")] {
        let is_bundled =
            |name: &str| name.starts_with("bundle_emb.") && name.ends_with(suffix.as_str());
        if all.iter().any(|(name, _)| is_bundled(name)) {
            all.retain(|(name, _)| is_bundled(name));
            return all;
        }
    }
    all.truncate(1);
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_encoders_own_tensor_is_chosen_then_bundled_ones_then_the_first() {
        let folder = tempfile::tempdir().unwrap();
        let directory = EmbeddingDirectory::new(folder.path());
        let find = |name: &str, component| directory.vectors(name, component).unwrap().unwrap();

        let both = [("a", vec![1, 2], 0.0), ("clip_g", vec![2, 3], 1.0), ("clip_l", vec![2], 2.0)];
        write(&folder.path().join("both.safetensors"), &both);
        let g = find("both", Component::ClipG);
        assert_eq!((g.width, g.rows(), g.elements[0].to_bits()), (3, 2, 1f32.to_bits()));
        let l = find("both.safetensors", Component::ClipL);
        assert_eq!((l.width, l.elements), (2, vec![2.0; 2]), "a 1-D tensor is one vector");

        let bundled = [
            ("a", vec![1, 2], 0.0),
            ("bundle_emb.x.string_to_param.*", vec![1, 2], 3.0),
            ("bundle_emb.y.string_to_param.*", vec![1, 2], 4.0),
        ];
        write(&folder.path().join("bundled.safetensors"), &bundled);
        let bundled = find("bundled", Component::ClipL);
        assert_eq!(bundled.elements, [3.0, 3.0, 4.0, 4.0]);

        write(&folder.path().join("plain.safetensors"), &[("emb_params", vec![1, 2], 5.0)]);
        assert_eq!(find("plain", Component::ClipG).elements, [5.0, 5.0]);
    }

    #[test]
    fn a_name_is_found_below_the_directory_and_nowhere_else() {
        let folder = tempfile::tempdir().unwrap();
        let inside = folder.path().join("inside");
        fs::create_dir_all(inside.join("styles/old")).unwrap();
        write(&folder.path().join("secret.safetensors"), &[("a", vec![1, 2], 0.0)]);
        write(&inside.join("styles/old/ink.safetensors"), &[("a", vec![1, 2], 0.0)]);
        let directory = EmbeddingDirectory::new(&inside);
        let find = |name: &str| directory.vectors(name, Component::ClipL);

        for name in ["ink", "old/ink", "styles/old/ink.safetensors", "./ink"] {
            assert!(find(name).unwrap().is_some(), "{name}");
        }
        for name in ["nothing", "", "ink/", "styles"] {
            assert!(find(name).unwrap_or(None).is_none(), "{name}");
        }
        for name in ["../secret", "/etc/passwd", "styles/../../secret"] {
            assert!(matches!(find(name), Err(EmbeddingError::Outside { .. })), "{name}");
        }
        let absent = EmbeddingDirectory::new(folder.path().join("absent"));
        assert!(absent.vectors("ink", Component::ClipL).unwrap().is_none());
    }

    #[test]
    fn a_file_that_cannot_be_used_is_an_error_that_names_it() {
        let folder = tempfile::tempdir().unwrap();
        let directory = EmbeddingDirectory::new(folder.path());
        fs::write(folder.path().join("old.pt"), b"pickle").unwrap();
        fs::write(folder.path().join("cut.safetensors"), b"cut").unwrap();
        write(&folder.path().join("cube.safetensors"), &[("a", vec![1, 1, 1], 0.0)]);
        write(&folder.path().join("nan.safetensors"), &[("a", vec![1, 2], f32::NAN)]);
        write(&folder.path().join("none.safetensors"), &[]);

        for (name, reason) in [
            ("old", "convert it"),
            ("cut", "not a safetensors file"),
            ("cube", "shape [1, 1, 1]"),
            ("nan", "not finite"),
            ("none", "no tensor"),
        ] {
            let error = directory.vectors(name, Component::ClipL).unwrap_err().to_string();
            assert!(error.contains(reason) && error.contains(name), "{error}");
        }
    }

    fn write(path: &Path, tensors: &[(&str, Vec<usize>, f32)]) {
        let bytes: Vec<Vec<u8>> = tensors
            .iter()
            .map(|(_, shape, value)| value.to_le_bytes().repeat(shape.iter().product()))
            .collect();
        let views = tensors.iter().zip(&bytes).map(|((name, shape, _), bytes)| {
            let view = TensorView::new(safetensors::Dtype::F32, shape.clone(), bytes).unwrap();
            (*name, view)
        });
        fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
    }
}
