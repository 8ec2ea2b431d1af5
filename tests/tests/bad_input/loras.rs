//! LoRA files that are no LoRA for this farm, and those that change nothing.

use bytes::Bytes;
use luna_client::{ErrorCode, ErrorKind};
use luna_e2e::golden::tiny_lora;
use protocol::request::UploadFormat;

use crate::support::{Farm, assert_error, assert_words, base_request, bits, file, filled_file};

const QUERY: &str = "lora_te_text_model_encoder_layers_0_self_attn_q_proj";

#[tokio::test]
async fn what_this_version_cannot_apply_is_unsupported_by_name() {
    let mut farm = Farm::start().await;
    let mut wire = farm.wire().await;
    let (up, down) = (format!("{QUERY}.lora_up.weight"), format!("{QUERY}.lora_down.weight"));
    let reshape = format!("{QUERY}.reshape_weight");
    let bytes = file(&[(&up, &[32, 4]), (&down, &[4, 32]), (&reshape, &[2])]);
    let error = farm.client.upload_bytes(bytes.clone(), "odd", |_| {}).await.expect_err("odd");
    assert_eq!(error.kind(), ErrorKind::Adapter, "{error}");
    assert_eq!(error.code(), Some(ErrorCode::Unsupported), "{error}");
    assert_words(&error.to_string(), &[&reshape]);
    let error = wire.upload(&bytes, UploadFormat::Lora, None).await.expect_err("odd");
    assert_error(&error, ErrorCode::Unsupported, &[&reshape]);
    assert_eq!(farm.client.list_loras().await.expect("the broker answers"), []);
    farm.assert_serves().await;
}

#[tokio::test]
async fn a_lora_of_another_width_does_not_fit_and_both_shapes_are_named() {
    let mut farm = Farm::start().await;
    let wide = pair(&[64, 4], &[4, 64]);
    let adapter =
        farm.client.upload_bytes(wide, "wide", |_| {}).await.expect("it is a LoRA").adapter;
    let words = [
        "`clip_l.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight`",
        "[32, 32]",
        "[64, 64]",
        "`tiny`",
        &adapter.to_string(),
    ];
    let request = base_request().lora(adapter, 1.0);
    farm.assert_refuses(request, ErrorCode::LoraMismatch, &words).await;
    // Strength 0 changes nothing, and still does not make it fit.
    let request = base_request().lora(adapter, 0.0);
    farm.assert_refuses(request, ErrorCode::LoraMismatch, &words).await;
    // One that does not fit takes the good ones in its stack with it.
    let good = farm.good_lora().await;
    let request = base_request().lora(good, 1.0).lora(adapter, 1.0);
    farm.assert_refuses(request, ErrorCode::LoraMismatch, &words).await;
}

#[tokio::test]
async fn matrices_that_do_not_belong_together_are_rejected_by_name() {
    let mut farm = Farm::start().await;
    let (up, down) = (format!("{QUERY}.lora_up.weight"), format!("{QUERY}.lora_down.weight"));
    let lone: &[(&str, &[usize])] = &[(&up, &[32, 4])];
    for (bytes, words) in [
        (pair(&[32, 4], &[8, 32]), [QUERY, "[32, 4]", "[8, 32]"]),
        (pair(&[32], &[4, 32]), [&*up, "[32]", "two or more dimensions"]),
        (pair(&[32, 0], &[0, 32]), [&*down, "[0, 32]", "none of them 0"]),
        (file(lone), [&*up, &*down, "incomplete"]),
    ] {
        assert_rejected(&mut farm, bytes, &words).await;
    }
}

#[tokio::test]
async fn numbers_that_are_not_finite_are_rejected_by_name() {
    let mut farm = Farm::start().await;
    let (up, down) = (format!("{QUERY}.lora_up.weight"), format!("{QUERY}.lora_down.weight"));
    for value in [f32::NAN, f32::INFINITY] {
        let bytes = filled_file(&[(&up, &[32, 4]), (&down, &[4, 32])], value);
        assert_rejected(&mut farm, bytes, &[QUERY, "finite"]).await;
    }
}

#[tokio::test]
async fn a_lora_whose_text_encoder_keys_match_nothing_is_rejected() {
    let mut farm = Farm::start().await;
    let foreign: &[(&str, &[usize])] =
        &[("lora_te_foo.lora_up.weight", &[32, 4]), ("lora_te_foo.lora_down.weight", &[4, 32])];
    let words = ["none of the 2", "`lora_te_foo.lora_up.weight`"];
    assert_rejected(&mut farm, file(foreign), &words).await;
}

#[tokio::test]
async fn a_lora_for_bigg_alone_does_not_fit_a_model_without_it() {
    let mut farm = Farm::start().await;
    let name = "lora_te2_text_model_encoder_layers_0_mlp_fc1";
    let (up, down) = (format!("{name}.lora_up.weight"), format!("{name}.lora_down.weight"));
    let bytes = file(&[(&up, &[192, 4]), (&down, &[4, 48])]);
    let adapter =
        farm.client.upload_bytes(bytes, "bigG", |_| {}).await.expect("it is a LoRA").adapter;
    let target = "`clip_g.transformer.text_model.encoder.layers.0.mlp.fc1.weight`";
    let words = [target, "`tiny`", "none of", &adapter.to_string()];
    let request = base_request().lora(adapter, 1.0);
    farm.assert_refuses(request, ErrorCode::LoraMismatch, &words).await;
}

#[tokio::test]
async fn a_lora_that_fits_in_part_is_refused_or_if_the_request_is_lenient_the_rest_is_listed() {
    let mut farm = Farm::start().await;
    let both = tiny_lora("sdxl", "kohya");
    let uploaded = farm.client.upload_lora(both, |_| {}).await.expect("it is a LoRA");
    let request = base_request().lora(uploaded.adapter, 1.0);
    let words = ["clip_g.transformer.", "`matching`", &uploaded.adapter.to_string()];
    farm.assert_refuses(request.clone(), ErrorCode::LoraMismatch, &words).await;
    let encoding = farm.client.encode(request.lenient()).await;
    let encoding = encoding.expect("the part for CLIP-L fits");
    assert_ne!(bits(&encoding), farm.base(), "the part that fits must show");
    let entry = &encoding.receipt.stack[0];
    assert!(entry.applied > 0 && !entry.not_matched.is_empty(), "{entry:?}");
    assert!(entry.not_matched.iter().all(|key| key.starts_with("clip_g.")), "{entry:?}");
    let skipped = format!("{} keys", entry.not_matched.len());
    assert_words(&encoding.receipt.warnings.join("\n"), &[&skipped, &uploaded.adapter.to_string()]);
    farm.assert_serves().await;
}

#[tokio::test]
async fn a_lora_without_text_encoder_keys_is_accepted_and_says_that_it_changed_nothing() {
    let mut farm = Farm::start().await;
    let image_only = file(&[
        ("lora_unet_down_blocks_0_attentions_0_proj_in.lora_up.weight", &[320, 4]),
        ("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight", &[4, 320]),
    ]);
    let uploaded = farm.client.upload_bytes(image_only.clone(), "unet", |_| {}).await;
    let uploaded = uploaded.expect("a LoRA for the image model alone is fine");
    assert_eq!((uploaded.report.targets, uploaded.report.ignored), (0, 2));

    let raw = farm.wire().await.upload(&image_only, UploadFormat::Lora, None).await;
    let raw = raw.expect("a plain client may upload it as well");
    assert_eq!(raw.adapter, Some(uploaded.adapter), "both ways give one adapter");
    assert_eq!(raw.report.map(|report| (report.targets, report.ignored)), Some((0, 2)));

    let encoding = farm.client.encode(base_request().lora(uploaded.adapter, 1.0)).await;
    let encoding = encoding.expect("it is accepted");
    assert_eq!(bits(&encoding), farm.base(), "and changes nothing");
    let entry = &encoding.receipt.stack[0];
    assert_eq!((entry.adapter, entry.applied), (uploaded.adapter, 0));
    assert_eq!(entry.not_matched, Vec::<String>::new());
    farm.assert_serves().await;
}

/// Asserts that the SDK and the broker reject `bytes` alike, and keep nothing of them.
async fn assert_rejected(farm: &mut Farm, bytes: Bytes, words: &[&str]) {
    let error = farm.client.upload_bytes(bytes.clone(), "bad", |_| {}).await;
    let error = error.expect_err(words[0]);
    assert_eq!(error.kind(), ErrorKind::Adapter, "{error}");
    assert_eq!(error.code(), Some(ErrorCode::LoraRejected), "{error}");
    assert_words(&error.to_string(), words);
    let mut wire = farm.wire().await;
    let error = wire.upload(&bytes, UploadFormat::Lora, None).await.expect_err(words[0]);
    assert_error(&error, ErrorCode::LoraRejected, words);
    assert_eq!(farm.client.list_loras().await.expect("the broker answers"), []);
    farm.assert_serves().await;
}

/// A LoRA of one weight with matrices of these shapes.
fn pair(up: &[usize], down: &[usize]) -> Bytes {
    let names = ["up", "down"].map(|part| format!("{QUERY}.lora_{part}.weight"));
    file(&[(&names[0], up), (&names[1], down)])
}
