//! Requests to serve models, and what workers answer.

use protocol::{
    ErrorCode, Failure, Family, ModelDigest,
    reply::ModelInfo,
    request::{ModelFile, RegisterModel},
    worker::Register,
};

use crate::{
    ModelSpec, Registration,
    testing::{model, model_file},
};

/// A request to serve the model that `registration` is of, made of a path or of an uploaded file.
pub(super) fn register(id: u8, name: &str, budget_ms: u32, uploaded: bool) -> RegisterModel {
    let ModelSpec { name, family, mut files } = registration(name).spec;
    if uploaded {
        files = vec![ModelFile::Blob(model_file("uploaded").blob)];
    }
    let id = format!("register-{id}").parse().unwrap();
    RegisterModel { id, name, family, files, budget_ms: Some(budget_ms) }
}

pub(super) fn registration(name: &str) -> Registration {
    let files = vec![ModelFile::Path(format!("/models/{name}"))];
    let spec = ModelSpec { name: name.parse().unwrap(), family: Family::Sd15, files };
    Registration { spec, digest: model(name).digest }
}

/// What a worker may answer: the model, other weights, not now, or never.
pub(super) fn answer_to(asked: &Register, answer: u8) -> Result<ModelInfo, Failure> {
    let model = model(asked.name.as_str());
    match answer {
        0 => Ok(model),
        1 => Ok(ModelInfo { digest: ModelDigest::of(b"other weights"), ..model }),
        2 => Err(Failure::new(ErrorCode::Overloaded, "no memory now")),
        _ => Err(Failure::new(ErrorCode::Forbidden, "not in an allowed directory")),
    }
}
