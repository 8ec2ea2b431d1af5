//! Files of every layout, and files that must be refused.

use std::{fs, path::Path};

use candle_core::Device;
use fixtures::{
    Naming, Size, Tensor, checkpoint_tensors, config_json, encoder_tensors, to_safetensors,
};
use luna_worker::{
    model::LoadedModel,
    weights::{LoadError, load},
};
use protocol::{Component, Dtype, Family, ModelDigest};
use serde_json::json;

use crate::models::{encoder_file, spec};

#[test]
fn the_same_weights_have_the_same_digest_in_every_layout() {
    let folder = tempfile::tempdir().unwrap();
    let named = |name: &str, naming| {
        let folder = folder.path().join(name);
        let file = |component| encoder_file(&folder, Size::Tiny, component, naming);
        [file(Component::ClipL), file(Component::ClipG)]
    };
    let [l, g] = named("hf", Naming::Hf);
    let [open_l, open_g] = named("open", Naming::OpenClip);
    let checkpoint = checkpoint(folder.path(), Family::Sdxl);
    let bare = bare(folder.path());

    let expected = digest(Family::Sdxl, &[l.clone(), g.clone()], Dtype::Float16);
    for files in [
        vec![l.clone(), open_g.clone()],
        vec![open_g.clone(), l.clone()],
        vec![open_l.clone(), open_g],
        vec![checkpoint],
        vec![bare.clone(), g],
    ] {
        assert_eq!(digest(Family::Sdxl, &files, Dtype::Float16), expected, "{files:?}");
    }
    let expected = digest(Family::Sd15, &[l], Dtype::Float16);
    for file in [open_l, bare, self::checkpoint(folder.path(), Family::Sd15)] {
        let digest = digest(Family::Sd15, std::slice::from_ref(&file), Dtype::Float16);
        assert_eq!(digest, expected, "{file}");
    }
}

#[test]
fn another_storage_dtype_or_another_weight_is_another_digest() {
    let folder = tempfile::tempdir().unwrap();
    let file = encoder_file(folder.path(), Size::Tiny, Component::ClipL, Naming::Hf);
    let digest = |dtype| digest(Family::Sd15, std::slice::from_ref(&file), dtype);
    let all = [Dtype::Float32, Dtype::Float16, Dtype::Bfloat16].map(digest);
    assert!(all[0] != all[1] && all[1] != all[2] && all[0] != all[2]);

    let mut bytes = fs::read(&file).unwrap();
    let last = bytes.len() - 2;
    bytes[last] ^= 0x10;
    fs::write(&file, bytes).unwrap();
    assert_eq!(digest(Dtype::Float32), all[0], "clip_l's projection is not part of a model");
    let mut bytes = fs::read(&file).unwrap();
    bytes[last - 32 * 32 * 4] ^= 0x10;
    fs::write(&file, bytes).unwrap();
    assert_ne!(digest(Dtype::Float32), all[0]);
}

#[test]
fn a_missing_tensor_is_named_with_its_file() {
    for missing in [
        "text_model.encoder.layers.2.mlp.fc2.bias",
        "text_model.embeddings.token_embedding.weight",
        "text_model.final_layer_norm.weight",
        "text_projection.weight",
    ] {
        let error = load_changed(|tensors| tensors.retain(|tensor| tensor.name() != missing));
        let message = error.to_string();
        assert!(matches!(error, LoadError::MissingTensor { .. }), "{message}");
        assert!(message.contains(missing) && message.contains("clip.safetensors"), "{message}");
    }
}

#[test]
fn a_wrong_shape_is_named_with_both_shapes() {
    let key = "text_model.encoder.layers.1.self_attn.q_proj.weight";
    let error = load_changed(|tensors| replace(tensors, key, &[48, 47], Dtype::Float32));
    let message = error.to_string();
    for part in [key, "clip.safetensors", "[48, 47]", "[48, 48]"] {
        assert!(message.contains(part), "{message}");
    }
    let table = "text_model.embeddings.position_embedding.weight";
    for (shape, expected) in [([76, 48], "expected [77, 48]"), ([248, 47], "expected [248, 48]")] {
        let error = load_changed(|tensors| replace(tensors, table, &shape, Dtype::Float32));
        assert!(matches!(error, LoadError::Shape { .. }), "{error}");
        assert!(error.to_string().contains(expected), "{error}");
    }
    let error = load_changed(|tensors| replace(tensors, table, &[1025, 48], Dtype::Float32));
    assert!(matches!(error, LoadError::Positions { found: 1025, most: 1024, .. }), "{error}");
    assert!(error.to_string().contains("clip.safetensors"), "{error}");
    let table = "text_model.embeddings.token_embedding.weight";
    let error = load_changed(|tensors| replace(tensors, table, &[48], Dtype::Float32));
    assert!(matches!(error, LoadError::NotMatrix { .. }), "{error}");
}

#[test]
fn a_longer_table_of_positions_makes_longer_chunks() {
    let folder = tempfile::tempdir().unwrap();
    let l = encoder_file(folder.path(), Size::Tiny, Component::ClipL, Naming::Hf);
    let load_long = |rows: usize| {
        let mut tensors = encoder_tensors(Size::Tiny, Component::ClipG);
        let table = "text_model.embeddings.position_embedding.weight";
        replace(&mut tensors, table, &[rows, 48], Dtype::Float32);
        let file = folder.path().join(format!("{rows}.safetensors"));
        fs::write(&file, to_safetensors(&tensors).unwrap()).unwrap();
        write_config(&file);
        let file = file.to_str().unwrap().to_owned();
        load_files(Family::Sdxl, &[l.clone(), file]).unwrap()
    };
    let ordinary = load_long(77);
    for rows in [78, 248, 1024] {
        let long = load_long(rows);
        assert_ne!(long.digest, ordinary.digest);
        assert_eq!(long.info().chunk_tokens[&Component::ClipG] as usize, rows);
        assert_eq!(long.info().chunk_tokens[&Component::ClipL], 77);
    }
}

#[test]
fn an_element_type_that_cannot_be_read_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let file = encoder_file(folder.path(), Size::Tiny, Component::ClipL, Naming::Hf);
    let key = "text_model.final_layer_norm.bias";
    let dtype = |dtype: &str| format!("\"{key}\":{{\"dtype\":\"{dtype}\"");
    edit_header(&file, |header| header.replace(&dtype("F32"), &dtype("I32")));

    let error = load_files(Family::Sd15, &[file]).unwrap_err();
    assert!(matches!(error, LoadError::Dtype { .. }), "{error}");
    assert!(error.to_string().contains(key), "{error}");
}

#[test]
fn a_file_that_is_no_model_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let error = |name: &str, content: &[u8]| {
        let path = folder.path().join(name);
        fs::write(&path, content).unwrap();
        load_files(Family::Sd15, &[path.to_str().unwrap().to_owned()]).unwrap_err()
    };
    assert!(matches!(error("short", b"abc"), LoadError::Header { .. }));
    assert!(matches!(error("json", b"\x02\0\0\0\0\0\0\0[]"), LoadError::Header { .. }));
    let huge = (17u64 << 20).to_le_bytes();
    assert!(matches!(error("huge", &huge), LoadError::HeaderSize { .. }));
    let other = to_safetensors(&[Tensor::scalar("vae.weight", Dtype::Float32, 1.0)]).unwrap();
    assert!(matches!(error("other", &other), LoadError::NoEncoder { .. }));
    let absent = load_files(Family::Sd15, &["/absent/clip_l.safetensors".to_owned()]);
    assert!(absent.unwrap_err().to_string().contains("`/absent/clip_l.safetensors`"));
}

#[test]
fn files_that_do_not_make_the_family_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let l = encoder_file(folder.path(), Size::Tiny, Component::ClipL, Naming::Hf);
    let open = encoder_file(folder.path(), Size::Tiny, Component::ClipG, Naming::OpenClip);
    let sdxl = checkpoint(folder.path(), Family::Sdxl);
    let sd15 = checkpoint(folder.path(), Family::Sd15);
    let error = |family, files: &[&String]| {
        let files: Vec<String> = files.iter().map(|file| (*file).clone()).collect();
        load_files(family, &files).unwrap_err()
    };

    assert!(matches!(error(Family::Sdxl, &[&l]), LoadError::MissingComponent { .. }));
    assert!(matches!(error(Family::Sdxl, &[&sd15, &sd15]), LoadError::Twice { .. }));
    assert!(matches!(error(Family::Sdxl, &[&sdxl, &l]), LoadError::Surplus { .. }));
    assert!(matches!(error(Family::Sdxl, &[&sdxl, &open]), LoadError::Surplus { .. }));
    assert!(matches!(error(Family::Sd15, &[&sdxl]), LoadError::Foreign { .. }));
}

fn load_files(family: Family, files: &[String]) -> Result<LoadedModel, LoadError> {
    load(&spec(family, files), Dtype::Float32, &Device::Cpu)
}

fn digest(family: Family, files: &[String], dtype: Dtype) -> ModelDigest {
    load(&spec(family, files), dtype, &Device::Cpu).unwrap().digest
}

/// Loads an SDXL model whose bigG file was changed, which must fail.
fn load_changed(change: impl FnOnce(&mut Vec<Tensor>)) -> LoadError {
    let folder = tempfile::tempdir().unwrap();
    let l = encoder_file(folder.path(), Size::Tiny, Component::ClipL, Naming::Hf);
    let mut tensors = encoder_tensors(Size::Tiny, Component::ClipG);
    change(&mut tensors);
    let g = folder.path().join("clip.safetensors");
    fs::write(&g, to_safetensors(&tensors).unwrap()).unwrap();
    write_config(&g);
    load_files(Family::Sdxl, &[l, g.to_str().unwrap().to_owned()]).unwrap_err()
}

fn replace(tensors: &mut [Tensor], key: &str, shape: &[usize], dtype: Dtype) {
    let stream = fixtures::random::Stream::new(key, 1.0, 0.0, 0);
    let tensor = tensors.iter_mut().find(|tensor| tensor.name() == key).unwrap();
    *tensor = Tensor::seeded(key, shape, dtype, stream);
}

fn checkpoint(folder: &Path, family: Family) -> String {
    let path = folder.join(format!("{family}.safetensors"));
    let tensors = checkpoint_tensors(Size::Tiny, family, Dtype::Float32);
    fs::write(&path, to_safetensors(&tensors).unwrap()).unwrap();
    write_config(&path);
    path.to_str().unwrap().to_owned()
}

/// CLIP-L under the names of transformers 5, without `text_model.`.
fn bare(folder: &Path) -> String {
    let file = encoder_file(&folder.join("bare"), Size::Tiny, Component::ClipL, Naming::Hf);
    edit_header(&file, |header| header.replace("\"text_model.", "\""));
    file
}

fn edit_header(file: &str, edit: impl FnOnce(&str) -> String) {
    let bytes = fs::read(file).unwrap();
    let (length, rest) = bytes.split_first_chunk().unwrap();
    let (header, data) = rest.split_at(u64::from_le_bytes(*length).try_into().unwrap());
    let header = edit(std::str::from_utf8(header).unwrap());
    let length = (header.len() as u64).to_le_bytes();
    fs::write(file, [&length, header.as_bytes(), data].concat()).unwrap();
}

/// A configuration for all encoders of a file.
fn write_config(file: &Path) {
    let config = json!({
        "clip_l": config_json(Size::Tiny, Component::ClipL),
        "clip_g": config_json(Size::Tiny, Component::ClipG),
    });
    fs::write(file.with_extension("config.json"), config.to_string()).unwrap();
}
