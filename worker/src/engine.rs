//! What the executor computes: one request in, one reply with its receipt out.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Instant,
};

use bytes::Bytes;
use half::{bf16, f16};
use prompt::{Embeddings, Encoder, Tokenizer};
use protocol::{
    AdapterReceipt, CHUNK_TOKENS, Chunk, Component, ComponentTokens, Dtype, Failure, ModelName,
    Receipt, TensorRef, Times, WorkerName, header, limits,
    reply::{ClipEncodeReply, ConditioningRef},
    tensor,
};
use worker_core::RunDispatch;

use crate::{
    conditioning::{Array, Conditioning, PromptTokens},
    embeddings::EmbeddingDirectory,
    execution::{Applied, EncodeJob, EncodePrompt, Encoding, FailedPatch, Modes, StackEntry},
    executor::Job,
    failure::WireError as _,
    model::LoadedModel,
    request::{PromptInput, Request, RequestPrompt, invalid, too_large},
};

/// Positions of one request, over all prompts and components: those of as many ordinary chunks as a
/// request may have.
const POSITIONS_MAX: usize = limits::REQUEST_CHUNKS_MAX * CHUNK_TOKENS;

/// Everything that turns a request and a model into an answer.
pub(crate) struct Engine {
    pub(crate) worker: WorkerName,
    pub(crate) tokenizer: Tokenizer,
    pub(crate) embeddings: Option<EmbeddingDirectory>,
    pub(crate) modes: Modes,
}

/// The frames of a `clip_encode_reply`, without magic.
#[derive(Debug)]
pub(crate) struct Reply {
    pub(crate) times: Times,
    pub(crate) header: Bytes,
    pub(crate) attachments: Vec<Bytes>,
}

impl Engine {
    /// Answers `job`.
    pub(crate) fn encode(&self, job: &Job) -> Result<Reply, Failure> {
        let started = Instant::now();
        let request = &job.request;
        let model = &*job.model;
        let (tokens, warnings) = self.tokenize(model, &request.prompts)?;
        let prompts = tokens.into_iter().zip(&request.prompts).map(|(tokens, prompt)| {
            EncodePrompt { tokens, hook_stack: with_adapters(&prompt.hook_stack, job) }
        });
        let encode_job = EncodeJob {
            prompts: prompts.collect(),
            stack: with_adapters(&request.stack, job),
            options: request.options.clone(),
            interrupt: job.interrupt.clone(),
        };
        let encoding = self.modes.encode(model, &encode_job).map_err(|error| error.to_failure())?;
        check_finite(&encoding.conditionings, request.options.output_dtype)?;
        let times = times(job, started);
        let receipt = self.receipt(model, job, &encoding, times, warnings);
        let reply = reply(request, &encode_job.prompts, &encoding.conditionings, receipt);
        check_header(&reply.header)?;
        Ok(reply)
    }

    /// Tokens of every prompt for every component, and what had no effect.
    fn tokenize(
        &self,
        model: &LoadedModel,
        prompts: &[RequestPrompt],
    ) -> Result<(Vec<PromptTokens>, Vec<String>), Failure> {
        let mut warnings = Vec::new();
        let mut tokenized = Vec::with_capacity(prompts.len());
        for (index, prompt) in prompts.iter().enumerate() {
            let tokens = match &prompt.input {
                PromptInput::Tokens(tokens) => tokens.clone(),
                PromptInput::Text(text) => {
                    let texts = |_| text.as_str();
                    self.tokenize_texts(model, texts, &mut warnings)?
                }
                PromptInput::Texts(texts) => {
                    check_components(index, texts, model)?;
                    let mut tokens = self.tokenize_texts(
                        model,
                        |component| texts[&component].as_str(),
                        &mut warnings,
                    )?;
                    fill_up(&mut tokens, model);
                    tokens
                }
            };
            tokenized.push(tokens);
            check_sizes(&tokenized, model)?;
        }
        Ok((tokenized, warnings))
    }

    /// Tokens of one text for every component.
    fn tokenize_texts<'a>(
        &self,
        model: &LoadedModel,
        text_of: impl Fn(Component) -> &'a str,
        warnings: &mut Vec<String>,
    ) -> Result<PromptTokens, Failure> {
        let limits = prompt::Limits {
            prompt_bytes_max: limits::PROMPT_BYTES_MAX,
            chunks_max: limits::CHUNKS_MAX,
            ..prompt::Limits::default()
        };
        let directory = self.embeddings.as_ref().map(|directory| directory as &dyn Embeddings);
        let mut tokens = PromptTokens::new();
        for (&component, text_model) in &model.components {
            let config = text_model.config();
            let (width, chunk_tokens) = (config.hidden, config.positions);
            let encoder = Encoder { component, width, chunk_tokens };
            let result =
                prompt::tokenize(&self.tokenizer, text_of(component), encoder, directory, limits)
                    .map_err(|error| error.to_failure())?;
            warnings.extend(result.warnings.iter().map(ToString::to_string));
            tokens.insert(component, result.tokens);
        }
        Ok(tokens)
    }

    fn receipt(
        &self,
        model: &LoadedModel,
        job: &Job,
        encoding: &Encoding,
        times: Times,
        mut warnings: Vec<String>,
    ) -> Receipt {
        let Job { run, request, .. } = job;
        let stack = receipts(&request.stack, &encoding.stack, run);
        let hook_stacks = request.prompts.iter().zip(&encoding.hook_stacks);
        let mut hook_stacks: Vec<_> = hook_stacks
            .map(|(prompt, applied)| receipts(&prompt.hook_stack, applied, run))
            .collect();
        if hook_stacks.iter().all(Vec::is_empty) {
            hook_stacks.clear();
        }
        // The same hook in every prompt is worth one warning.
        let distinct: BTreeSet<String> = hook_stacks
            .iter()
            .flatten()
            .chain(&stack)
            .filter_map(|entry| skipped(entry, &model.name))
            .collect();
        warnings.extend(distinct);
        Receipt {
            model: model.name.clone(),
            model_digest: model.digest,
            weights_dtype: model.dtype,
            stack,
            hook_stacks,
            mode: encoding.mode,
            fidelity: encoding.fidelity,
            merged_weights: encoding.merged_weights,
            worker: self.worker.clone(),
            attempts: job.attempt,
            times,
            cache: None,
            warnings,
        }
    }
}

/// Bounds what is computed and what the reply has: chunks of all prompts and components, and their
/// positions, of which a chunk of a LongCLIP has more.
fn check_sizes(prompts: &[PromptTokens], model: &LoadedModel) -> Result<(), Failure> {
    let count = |of: &dyn Fn(Component, &ComponentTokens) -> usize| -> usize {
        prompts.iter().flatten().map(|(&component, tokens)| of(component, tokens)).sum()
    };
    let chunks = count(&|_, tokens| tokens.chunks.len());
    // A component that the model does not have is refused later, by its name.
    let positions = |component| model.components.get(&component).map(|it| it.config().positions);
    let positions = count(&|component, tokens| {
        tokens.chunks.len() * positions(component).unwrap_or(CHUNK_TOKENS)
    });
    for (found, most, what) in [
        (chunks, limits::REQUEST_CHUNKS_MAX, "chunks"),
        (positions, POSITIONS_MAX, "positions in its chunks"),
    ] {
        if found > most {
            return Err(too_large(format!(
                "the request has {found} {what}: at most {most} are accepted"
            )));
        }
    }
    Ok(())
}

/// Whether there is a text for every component of the model and no other.
fn check_components(
    index: usize,
    texts: &BTreeMap<Component, String>,
    model: &LoadedModel,
) -> Result<(), Failure> {
    if texts.keys().eq(model.components.keys()) {
        return Ok(());
    }
    let names = |components: Vec<&Component>| {
        let names: Vec<String> = components.iter().map(|name| format!("`{name}`")).collect();
        if names.is_empty() { "no component".to_owned() } else { names.join(", ") }
    };
    let (found, expected) =
        (names(texts.keys().collect()), names(model.components.keys().collect()));
    Err(invalid(format!(
        "`texts` of prompt {index} are for {found}: model `{}` takes one for each of {expected}",
        model.name
    )))
}

/// Fills shorter components up with chunks of the empty prompt, as `CLIPTextEncodeSDXL` does.
fn fill_up(tokens: &mut PromptTokens, model: &LoadedModel) {
    let longest = tokens.values().map(|tokens| tokens.chunks.len()).max().unwrap_or(0);
    for (&component, tokens) in tokens {
        let chunk_tokens = model.components[&component].config().positions;
        tokens.chunks.resize_with(longest, || prompt::empty_chunk(component, chunk_tokens));
    }
}

/// The entries of a stack with the adapters that they name.
fn with_adapters(stack: &[protocol::request::StackEntry], job: &Job) -> Vec<StackEntry> {
    let entries = stack.iter().map(|entry| StackEntry {
        id: entry.adapter,
        adapter: job.adapters[&entry.adapter].clone(),
        strength_patch: entry.strength_patch,
        strength_model: entry.strength_model,
    });
    entries.collect()
}

/// What was done with the entries of a stack.
fn receipts(
    stack: &[protocol::request::StackEntry],
    applied: &[Applied],
    run: &RunDispatch,
) -> Vec<AdapterReceipt> {
    let wire = |failed: &FailedPatch| protocol::FailedPatch {
        key: failed.key.clone(),
        reason: failed.reason.clone(),
    };
    let entries = stack.iter().zip(applied).map(|(entry, applied)| AdapterReceipt {
        adapter: entry.adapter,
        strength_patch: entry.strength_patch,
        strength_model: entry.strength_model,
        applied: applied.applied,
        not_matched: applied.not_matched.clone(),
        failed: applied.failed.iter().map(wire).collect(),
        source: run.sources[&entry.adapter],
    });
    entries.collect()
}

/// A sentence about what an adapter has and the model did not take.
fn skipped(entry: &AdapterReceipt, model: &ModelName) -> Option<String> {
    let AdapterReceipt { adapter, applied, not_matched, failed, .. } = entry;
    let mut parts = Vec::new();
    if !not_matched.is_empty() {
        parts.push(format!("{} keys are not in model `{model}`", not_matched.len()));
    }
    if let Some(first) = failed.first() {
        parts.push(format!("{} patches do not fit, first {}", failed.len(), first.key));
    }
    let skipped = parts.join(", ");
    (!parts.is_empty()).then(|| format!("adapter {adapter}: {applied} weights changed, {skipped}"))
}

/// Refuses an encoding that overflowed: no client can use it, and most would not notice.
fn check_finite(conditionings: &[Conditioning], dtype: Dtype) -> Result<(), Failure> {
    let is_finite = |element: &f32| match dtype {
        Dtype::Float32 => element.is_finite(),
        Dtype::Float16 => f16::from_f32(*element).is_finite(),
        Dtype::Bfloat16 => bf16::from_f32(*element).is_finite(),
    };
    for (index, Conditioning { cond, pooled }) in conditionings.iter().enumerate() {
        if !cond.elements.iter().chain(&pooled.elements).all(is_finite) {
            return Err(invalid(format!(
                "the encoding of prompt {index} overflows `{dtype}`: lower its weights or the strengths of the stack"
            )));
        }
    }
    Ok(())
}

/// Refuses a header that no client would read, so that the request is answered all the same.
fn check_header(header: &Bytes) -> Result<(), Failure> {
    let (bytes, most) = (header.len(), limits::HEADER_BYTES_MAX);
    if bytes > most {
        return Err(too_large(format!(
            "the reply's header has {bytes} bytes, at most {most} can be sent: use a shorter stack, \
             or adapters and prompts with fewer names that nothing knows"
        )));
    }
    Ok(())
}

/// Where the time went, `started` being when the executor took the job.
fn times(job: &Job, started: Instant) -> Times {
    let ms = |from: Instant, to: Instant| to.saturating_duration_since(from).as_secs_f64() * 1e3;
    let RunDispatch { arrived, loaded, .. } = job.run;
    Times {
        queue_ms: f64::from(job.queued_ms) + ms(loaded, started),
        load_ms: ms(arrived, loaded),
        compute_ms: ms(started, Instant::now()),
    }
}

fn reply(
    request: &Request,
    prompts: &[EncodePrompt],
    conditionings: &[Conditioning],
    receipt: Receipt,
) -> Reply {
    let dtype = request.options.output_dtype;
    let mut attachments = Vec::with_capacity(2 * conditionings.len());
    let mut attach = |array: &Array| {
        let attachment =
            u16::try_from(attachments.len()).expect("the number of prompts is limited");
        attachments.push(to_bytes(&array.elements, dtype));
        let size = |&size| u32::try_from(size).expect("the number of chunks is limited");
        TensorRef { dtype, shape: array.shape.iter().map(size).collect(), attachment }
    };
    let results = conditionings
        .iter()
        .zip(prompts)
        .map(|(conditioning, prompt)| ConditioningRef {
            cond: attach(&conditioning.cond),
            pooled: attach(&conditioning.pooled),
            tokens: request.options.return_tokens.then(|| chunks_of(&prompt.tokens)),
        })
        .collect();
    let times = receipt.times;
    let header = header::write(&ClipEncodeReply { id: request.id.clone(), results, receipt });
    Reply { times, header: header.into(), attachments }
}

fn chunks_of(tokens: &PromptTokens) -> BTreeMap<Component, Vec<Chunk>> {
    tokens.iter().map(|(component, tokens)| (*component, tokens.chunks.clone())).collect()
}

/// Little-endian bytes of `elements` in `dtype`, rounded to nearest.
fn to_bytes(elements: &[f32], dtype: Dtype) -> Bytes {
    match dtype {
        Dtype::Float32 => tensor::f32_to_bytes(elements),
        Dtype::Float16 => {
            let bytes = elements.iter().flat_map(|&element| f16::from_f32(element).to_le_bytes());
            bytes.collect::<Vec<u8>>().into()
        }
        Dtype::Bfloat16 => {
            let bytes = elements.iter().flat_map(|&element| bf16::from_f32(element).to_le_bytes());
            bytes.collect::<Vec<u8>>().into()
        }
    }
}

#[cfg(test)]
mod tests {
    use protocol::{ErrorCode, Family};

    use super::*;
    use crate::{execution::ModeSettings, testing};

    #[test]
    fn an_encoding_that_overflows_its_dtype_is_refused() {
        let code = |element: f32, dtype| {
            let cond = Array { shape: vec![1, 1, 2], elements: vec![0.5, element] };
            let pooled = Array { shape: vec![1, 1], elements: vec![0.0] };
            check_finite(&[Conditioning { cond, pooled }], dtype).err().map(|failure| failure.code)
        };
        let refused = Some(ErrorCode::InvalidRequest);
        for dtype in [Dtype::Float32, Dtype::Float16, Dtype::Bfloat16] {
            assert_eq!(code(f32::NAN, dtype), refused);
            assert_eq!(code(f32::INFINITY, dtype), refused);
            assert_eq!(code(65504.0, dtype), None);
        }
        assert_eq!(code(70_000.0, Dtype::Float16), refused);
        assert_eq!(code(70_000.0, Dtype::Float32), None);
    }

    #[test]
    fn texts_of_components_are_tokenised_apart_and_filled_up_with_the_empty_prompt() {
        let model = testing::model(Family::Sdxl, Dtype::Float32);
        let engine = engine();
        let long = "cat ".repeat(100);
        let texts = [(Component::ClipL, "a dog"), (Component::ClipG, long.as_str())];
        let texts = texts.map(|(component, text)| (component, text.to_owned()));
        let prompt = |input| [RequestPrompt { input, hook_stack: Vec::new() }];
        let tokens = |input| engine.tokenize(&model, &prompt(input)).unwrap().0.remove(0);

        let both = tokens(PromptInput::Texts(texts.clone().into()));
        for (component, text) in &texts {
            let alone = tokens(PromptInput::Text(text.clone()));
            let alone = &alone[component].chunks;
            assert_eq!(&both[component].chunks[..alone.len()], &alone[..], "{component}");
        }
        assert_eq!(both[&Component::ClipG].chunks.len(), 2);
        let empty = prompt::empty_chunk(Component::ClipL, CHUNK_TOKENS);
        assert_eq!(both[&Component::ClipL].chunks[1..], [empty]);
    }

    #[test]
    fn texts_must_be_for_the_components_of_the_model() {
        let engine = engine();
        let (l, g) = (Component::ClipL, Component::ClipG);
        for (family, components) in
            [(Family::Sdxl, &[l][..]), (Family::Sd15, &[l, g]), (Family::Sd15, &[])]
        {
            let model = testing::model(family, Dtype::Float32);
            let texts = components.iter().map(|component| (*component, "a".to_owned())).collect();
            let input = PromptInput::Texts(texts);
            let prompts = [RequestPrompt { input, hook_stack: Vec::new() }];
            let failure = engine.tokenize(&model, &prompts).unwrap_err();
            assert_eq!(failure.code, ErrorCode::InvalidRequest);
            assert!(failure.message.contains("`texts` of prompt 0"), "{failure}");
        }
    }

    #[test]
    fn a_header_that_no_client_reads_is_refused() {
        let header = |bytes| check_header(&vec![0; bytes].into()).err().map(|failure| failure.code);
        assert_eq!(header(limits::HEADER_BYTES_MAX), None);
        assert_eq!(header(limits::HEADER_BYTES_MAX + 1), Some(ErrorCode::TooLarge));
    }

    #[test]
    fn a_request_has_as_many_positions_as_its_ordinary_chunks_would() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("model.safetensors");
        fixtures::write_long_clip(&file, fixtures::Size::Tiny, Dtype::Float32).unwrap();
        let spec = format!("long=sd15:{}", file.display()).parse().unwrap();
        let long = crate::weights::load(&spec, Dtype::Float32, &candle_core::Device::Cpu).unwrap();
        let ordinary = testing::model(Family::Sd15, Dtype::Float32);
        let prompts = |chunks: usize| -> Vec<PromptTokens> {
            let chunks = vec![Chunk::default(); chunks];
            let tokens = ComponentTokens { chunks, ..ComponentTokens::default() };
            vec![[(Component::ClipL, tokens)].into(); 2]
        };
        for (model, most) in [(&ordinary, 64), (&long, POSITIONS_MAX / 248 / 2)] {
            assert_eq!(check_sizes(&prompts(most), model), Ok(()));
            let failure = check_sizes(&prompts(most + 1), model).unwrap_err();
            assert_eq!(failure.code, ErrorCode::TooLarge, "{failure}");
        }
        let message = check_sizes(&prompts(20), &long).unwrap_err().message;
        assert_eq!(
            message,
            "the request has 9920 positions in its chunks: at most 9856 are accepted"
        );
    }

    fn engine() -> Engine {
        Engine {
            worker: "w".parse().unwrap(),
            tokenizer: Tokenizer::new(),
            embeddings: None,
            modes: Modes::new(ModeSettings::default()),
        }
    }
}
