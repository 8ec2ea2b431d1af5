//! What holds for any LoRA file and any canonical bytes, as functions that panic where it does not.
//!
//! Each answers whether an adapter came out, so that a test can tell that a corpus is worth its
//! name.

use std::collections::BTreeMap;

use luna_adapter::{AdapterError, PatchSet, read_lora};

/// Longer messages are not fit to be read, whatever the file holds.
const MESSAGE_BYTES_MAX: usize = 8192;

/// Beginnings of keys, known to the key map or close to such.
const PREFIXES: [&str; 24] = [
    "lora_te_text_model_encoder_layers_0_mlp_fc1",
    "lora_te_text_model_encoder_layers_31_self_attn_out_proj",
    "lora_te1_text_model_encoder_layers_0_mlp_fc1",
    "lora_te1_text_model_encoder_layers_32_mlp_fc1",
    "lora_te2_text_model_encoder_layers_0_mlp_fc1",
    "lora_te2_text_model_encoder_layers_07_self_attn_q_proj",
    "lora_te3_text_model_encoder_layers_0_mlp_fc1",
    "lora_te1_text_projection",
    "lora_te2_text_projection",
    "lora_prior_te_text_projection",
    "text_encoder.text_model.encoder.layers.0.mlp.fc1",
    "text_encoder.text_model.encoder.layers.0.layer_norm1",
    "text_encoder_2.text_model.encoder.layers.0.mlp.fc1",
    "text_encoder_2.text_model.encoder.layers.12.self_attn.v_proj",
    "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1",
    "text_encoders.clip_l.transformer.text_model.encoder.layers.0.layer_norm1",
    "text_encoders.clip_l.transformer.text_model.final_layer_norm",
    "text_encoders.clip_l.transformer.text_model.embeddings.token_embedding",
    "text_encoders.clip_g.transformer.text_model.encoder.layers.0.mlp.fc1",
    "text_encoders.clip_g.transformer.text_projection",
    "text_encoders.t5xxl.transformer.shared",
    "lora_unet_mid_block_attentions_0_proj_in",
    "te_",
    "",
];

/// Ends of keys, of every kind and of none.
const SUFFIXES: [&str; 43] = [
    ".lora_up.weight",
    ".lora_down.weight",
    ".lora_mid.weight",
    "_lora.up.weight",
    "_lora.down.weight",
    ".lora_B.weight",
    ".lora_A.weight",
    ".lora.up.weight",
    ".lora.down.weight",
    ".lora_B",
    ".lora_A",
    ".lora_linear_layer.up.weight",
    ".lora_linear_layer.down.weight",
    ".lora_B.default.weight",
    ".lora_A.default.weight",
    ".hada_w1_a",
    ".hada_w1_b",
    ".hada_w2_a",
    ".hada_w2_b",
    ".hada_t1",
    ".hada_t2",
    ".lokr_w1",
    ".lokr_w1_a",
    ".lokr_w1_b",
    ".lokr_w2",
    ".lokr_w2_a",
    ".lokr_w2_b",
    ".lokr_t2",
    ".a1.weight",
    ".a2.weight",
    ".b1.weight",
    ".b2.weight",
    ".oft_blocks",
    ".rescale",
    ".alpha",
    ".dora_scale",
    ".w_norm",
    ".diff",
    ".diff_b",
    ".set_weight",
    ".b_norm",
    ".reshape_weight",
    "",
];

/// Names of element types, and the bytes of one element.
const DTYPES: [(&str, usize); 7] =
    [("F32", 4), ("F16", 2), ("BF16", 2), ("F64", 8), ("I64", 8), ("U8", 1), ("F8_E4M3", 1)];

/// Bytes that elements are made of; the last makes NaNs of all floats.
const FILLS: [u8; 4] = [0x3f, 0x00, 0x01, 0xff];

/// The length of the header stands before it.
const LENGTH_BYTES: usize = 8;
/// More than enough data for tensors that are refused by their headers.
const DATA_BYTES_MAX: usize = 1 << 16;
const TENSORS_MAX: usize = 24;
const NAME_BYTES_MAX: usize = 96;

/// Reads any bytes, and the same bytes with sizes that fit, as a file and as canonical bytes.
pub fn any_file(bytes: &[u8]) -> bool {
    let is_adapter = check_bytes(bytes);
    repaired(bytes).is_some_and(|bytes| check_bytes(&bytes)) || is_adapter
}

/// The same header with its own length before it and as much data after it as it announces.
///
/// Nearly every mutation breaks one of the two, and then nothing behind them would be reached.
fn repaired(bytes: &[u8]) -> Option<Vec<u8>> {
    let rest = bytes.get(LENGTH_BYTES..)?;
    let end = rest.windows(2).position(|pair| pair == b"}}")? + 2;
    let spaces = rest[end..].iter().take_while(|byte| **byte == b' ').count();
    let (header, data) = rest.split_at(end + spaces);
    let json: BTreeMap<String, serde_json::Value> = serde_json::from_slice(header).ok()?;
    let ends = json.values().filter_map(|tensor| tensor["data_offsets"][1].as_u64());
    let announced = usize::try_from(ends.max().unwrap_or(0)).ok()?;
    let mut data = data.to_vec();
    data.resize(announced.min(DATA_BYTES_MAX), 0);
    Some([&(header.len() as u64).to_le_bytes()[..], header, &data].concat())
}

fn check_bytes(bytes: &[u8]) -> bool {
    let is_file = check_file(bytes).is_some();
    let set = PatchSet::from_bytes(bytes).inspect_err(check_error);
    let is_canonical = set.is_ok();
    if let Ok(set) = set {
        assert!(set.to_bytes() == bytes, "canonical bytes are written as they were read");
        check_set(&set);
    }
    is_file || is_canonical
}

/// Reads a file whose tensors `recipe` names, forwards and backwards.
pub fn any_keys(recipe: &[u8]) -> bool {
    let tensors = Recipe { bytes: recipe }.tensors();
    let set = check_file(&file(tensors.iter()));
    let backwards = check_file(&file(tensors.iter().rev()));
    assert_eq!(set, backwards, "the order of the tensors in a file means nothing");
    set.is_some_and(|set| !set.is_empty())
}

/// Reads a file; what comes out is an adapter and accounts for every key, or a fit error.
fn check_file(bytes: &[u8]) -> Option<PatchSet> {
    let (set, report) = read_lora(bytes).inspect_err(check_error).ok()?;
    check_set(&set);
    assert_eq!(report.unmatched, set.unmatched());
    assert!(report.targets.iter().eq(set.patches().keys()));
    assert!(report.unmatched.iter().all(|key| !report.superseded.contains(key)));
    let without_effect = report.unmatched.len() + report.superseded.len();
    assert!(without_effect <= report.text_encoder_keys);
    assert_eq!(set.is_empty(), !report.has_text_encoder_keys());
    Some(set)
}

/// An adapter comes back from its bytes, and its identity with it.
fn check_set(set: &PatchSet) {
    let bytes = set.to_bytes();
    let back = PatchSet::from_bytes(&bytes).expect("canonical bytes are accepted");
    assert_eq!(back, *set, "an adapter comes back from its bytes");
    assert_eq!(back.id(), set.id());
    assert!(back.to_bytes() == bytes, "an adapter has one canonical form");
}

/// An error has a wire code and a message of one short line.
fn check_error(error: &AdapterError) {
    let message = error.to_string();
    assert!(message.len() <= MESSAGE_BYTES_MAX, "{message}");
    assert!(!message.chars().any(char::is_control), "{message:?}");
    let _ = error.kind();
}

/// One tensor of a file.
#[derive(Debug)]
struct Tensor {
    dtype: &'static str,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

/// A safetensors file of these tensors in this order.
fn file<'t>(tensors: impl Iterator<Item = (&'t String, &'t Tensor)>) -> Vec<u8> {
    let mut entries = Vec::new();
    let mut data = Vec::new();
    for (name, Tensor { dtype, shape, bytes }) in tensors {
        let name = serde_json::Value::from(name.as_str());
        let (start, end) = (data.len(), data.len() + bytes.len());
        entries.push(format!(
            r#"{name}:{{"dtype":"{dtype}","shape":{shape:?},"data_offsets":[{start},{end}]}}"#
        ));
        data.extend_from_slice(bytes);
    }
    let header = format!("{{{}}}", entries.join(","));
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &data].concat()
}

/// Instructions for a file; where they end, all further numbers are 0.
struct Recipe<'b> {
    bytes: &'b [u8],
}

impl Recipe<'_> {
    fn tensors(mut self) -> BTreeMap<String, Tensor> {
        let mut tensors = BTreeMap::new();
        while !self.bytes.is_empty() && tensors.len() < TENSORS_MAX {
            let name = self.name();
            let tensor = self.tensor();
            if name != "__metadata__" {
                tensors.insert(name, tensor);
            }
        }
        tensors
    }

    /// A beginning and an end, each a known one or any text.
    fn name(&mut self) -> String {
        self.part(&PREFIXES) + &self.part(&SUFFIXES)
    }

    fn part(&mut self, known: &[&str]) -> String {
        let choice = usize::from(self.next());
        if let Some(known) = known.get(choice) {
            return (*known).to_owned();
        }
        let length = choice.min(NAME_BYTES_MAX);
        String::from_utf8_lossy(self.take(length)).into_owned()
    }

    fn tensor(&mut self) -> Tensor {
        let [choice, fill] = [self.next(), self.next()].map(usize::from);
        let (dtype, size) = DTYPES[choice % DTYPES.len()];
        let dimensions = choice / DTYPES.len() % 6;
        let shape: Vec<_> = (0..dimensions).map(|_| usize::from(self.next() % 7)).collect();
        let length = size * shape.iter().product::<usize>();
        Tensor { dtype, shape, bytes: vec![FILLS[fill % FILLS.len()]; length] }
    }

    fn next(&mut self) -> u8 {
        self.take(1).first().copied().unwrap_or(0)
    }

    fn take(&mut self, length: usize) -> &[u8] {
        let (taken, rest) = self.bytes.split_at(length.min(self.bytes.len()));
        self.bytes = rest;
        taken
    }
}
