//! Loading a model: from the files that people have to checked, rounded, identified weights.
//!
//! A file is mapped, never read whole. Every tensor is checked against the shape that the sizes
//! in the file imply, rounded to the storage dtype, hashed, and put into one buffer of its own;
//! then its pages are given back. On the CPU weights are held as f32, which is numerically the
//! same as holding the storage dtype and widening at every use; only the token embedding, of which
//! a request needs a few rows, is held in the storage dtype.

mod convert;
mod encoder;
mod error;
mod file;
mod heads;
mod names;

use std::collections::BTreeMap;

use candle_core::Device;
use protocol::{Component, Dtype, ModelDigest};

use self::{
    encoder::Encoder,
    file::TensorFile,
    names::{Found, find_encoders},
};
use crate::model::{LoadedModel, ModelSpec, TextModel};

pub(crate) use convert::{float_dtype, round, widened};
pub use error::LoadError;

/// What the digest of a model starts with; changes when the digest's definition does.
const DIGEST_CONTEXT: &[u8] = b"luna model 2\0";

/// Loads the model that `spec` names, every weight rounded to `dtype`.
///
/// # Errors
/// When a file cannot be read, lacks a component or a tensor, or holds one that does not fit; the
/// error names the file and the tensor.
pub fn load(spec: &ModelSpec, dtype: Dtype, device: &Device) -> Result<LoadedModel, LoadError> {
    let files: Vec<TensorFile> =
        spec.files.iter().map(|file| TensorFile::open(file)).collect::<Result<_, _>>()?;
    let mut hasher = blake3::Hasher::new();
    hasher.update(DIGEST_CONTEXT);
    let mut components = BTreeMap::new();
    for (component, (file, found)) in assign(spec, &files)? {
        let encoder = Encoder::inspect(file, &found, component)?;
        let model: TextModel = encoder.load(component, dtype, device, &mut hasher)?;
        components.insert(component, model);
    }
    let digest = ModelDigest::from_bytes(hasher.finalize().into());
    Ok(LoadedModel { name: spec.name.clone(), family: spec.family, digest, dtype, components })
}

/// Which encoder of which file is which component.
type Assigned<'a> = BTreeMap<Component, (&'a TensorFile, Found)>;

/// Decides which encoder of which file is which component: those that can be told first, then a
/// single one with OpenCLIP's names as bigG, then the others in the order of the family.
fn assign<'a>(spec: &ModelSpec, files: &'a [TensorFile]) -> Result<Assigned<'a>, LoadError> {
    let mut assigned = Assigned::new();
    let mut open = Vec::new();
    for file in files {
        let found = find_encoders(file);
        if found.is_empty() {
            return Err(LoadError::NoEncoder { file: file.path().to_owned() });
        }
        for found in found {
            match found.component {
                Some(component) => claim(spec, &mut assigned, component, file, found)?,
                None => open.push((file, found)),
            }
        }
    }
    assign_by_order(spec, &mut assigned, open)?;
    for &component in spec.family.components() {
        if !assigned.contains_key(&component) {
            return Err(LoadError::MissingComponent { spec: spec.clone(), component });
        }
    }
    Ok(assigned)
}

fn claim<'a>(
    spec: &ModelSpec,
    assigned: &mut Assigned<'a>,
    component: Component,
    file: &'a TensorFile,
    found: Found,
) -> Result<(), LoadError> {
    let path = || file.path().to_owned();
    if !spec.family.components().contains(&component) {
        return Err(LoadError::Foreign { file: path(), component, family: spec.family });
    }
    match assigned.insert(component, (file, found)) {
        None => Ok(()),
        Some((other, _)) => {
            let other = other.path().to_owned();
            Err(LoadError::Twice { component, file: path(), other })
        }
    }
}

fn assign_by_order<'a>(
    spec: &ModelSpec,
    assigned: &mut Assigned<'a>,
    mut open: Vec<(&'a TensorFile, Found)>,
) -> Result<(), LoadError> {
    let has_big_g = spec.family.components().contains(&Component::ClipG);
    let mut open_clip = open.iter().enumerate().filter(|(_, (_, found))| found.is_open_clip());
    if has_big_g
        && !assigned.contains_key(&Component::ClipG)
        && let (Some((index, _)), None) = (open_clip.next(), open_clip.next())
    {
        assigned.insert(Component::ClipG, open.remove(index));
    }
    for (file, found) in open {
        let free = spec.family.components().iter().find(|it| !assigned.contains_key(*it));
        let Some(&component) = free else {
            return Err(LoadError::Surplus { file: file.path().to_owned(), family: spec.family });
        };
        assigned.insert(component, (file, found));
    }
    Ok(())
}
