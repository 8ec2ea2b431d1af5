//! Uploads that are cut, damaged or out of order: nothing of them is ever visible.

use bytes::Bytes;
use luna_client::ErrorCode;
use luna_e2e::golden::tiny_lora;
use protocol::{
    AdapterId, BlobDigest,
    request::{UploadFormat, UploadOp},
};

use crate::{
    store::blob_path,
    support::{Farm, assert_error, base_request, flipped},
};

#[tokio::test]
async fn an_upload_that_is_committed_early_says_how_much_came_and_can_go_on() {
    let mut farm = Farm::start().await;
    let mut wire = farm.wire().await;
    let lora = kohya();
    let half = lora.len() / 2;
    let upload = wire.begin(lora.len(), UploadFormat::Lora, None).await.expect("it may begin");
    let chunk = |offset| UploadOp::Chunk { upload: upload.clone(), offset };
    let commit = UploadOp::Commit { upload: upload.clone() };
    wire.upload_step(chunk(0), vec![lora.slice(..half)]).await.expect("a chunk is taken");

    let error = wire.upload_step(commit.clone(), Vec::new()).await.expect_err("half is missing");
    let words = ["truncated", &lora.len().to_string(), &half.to_string()];
    assert_error(&error, ErrorCode::InvalidRequest, &words);
    farm.assert_serves().await;

    let rest = lora.slice(half..);
    wire.upload_step(chunk(half as u64), vec![rest]).await.expect("the rest is taken");
    wire.upload_step(commit, Vec::new()).await.expect("now everything is there");
}

#[tokio::test]
async fn a_file_that_was_cut_is_rejected_wherever_it_was_cut() {
    let mut farm = Farm::start().await;
    let mut wire = farm.wire().await;
    let lora = kohya();
    for length in [1, 7, 8, 100, 5_000, lora.len() - 1] {
        let cut = wire.upload(&lora[..length], UploadFormat::Lora, None).await;
        let error = cut.expect_err("a part is no LoRA");
        assert_error(&error, ErrorCode::LoraRejected, &["the file"]);
    }
    let longer = [&lora[..], b"\0"].concat();
    let error = wire.upload(&longer, UploadFormat::Lora, None).await.expect_err("a byte too many");
    assert_error(&error, ErrorCode::LoraRejected, &[&longer.len().to_string()]);
    assert_nothing_stored(&mut farm).await;
}

#[tokio::test]
async fn a_flipped_bit_is_found_by_the_declared_digest() {
    let mut farm = Farm::start().await;
    let mut wire = farm.wire().await;
    let lora = kohya();
    let digest = BlobDigest::of(&lora);
    let damaged = flipped(&lora, lora.len() * 8 - 3);
    let found = BlobDigest::of(&damaged);
    let words = [&*format!("`{digest}`"), &*format!("`{found}`")];
    let error = wire.upload(&damaged, UploadFormat::Lora, Some(digest)).await;
    assert_error(&error.expect_err("it is another file"), ErrorCode::LoraRejected, &words);

    let unrelated = BlobDigest::of(b"something else");
    let error = wire.upload(&lora, UploadFormat::Lora, Some(unrelated)).await;
    let words = [&*format!("`{digest}`"), &*format!("`{unrelated}`")];
    assert_error(&error.expect_err("it has another digest"), ErrorCode::LoraRejected, &words);
    assert_nothing_stored(&mut farm).await;

    wire.upload(&lora, UploadFormat::Lora, Some(digest)).await.expect("the real one is taken");
}

#[tokio::test]
async fn a_flipped_bit_in_a_canonical_adapter_never_goes_by_the_same_name() {
    let mut farm = Farm::start().await;
    let adapter = farm.good_lora().await;
    let path = blob_path(&farm.cluster, &adapter);
    let canonical = std::fs::read(path).expect("the store keeps blobs under their names");
    assert_eq!(AdapterId::of(&canonical), adapter);
    let evicted = farm.client.evict_lora(&[adapter], true).await.expect("the broker answers");
    assert_eq!(evicted.evicted, [adapter]);

    let mut wire = farm.wire().await;
    let digest = Some(BlobDigest::of(&canonical));
    let (mut rejected, mut renamed) = (0, 0);
    for bit in (0..canonical.len() * 8).step_by(canonical.len() / 8 + 1) {
        let damaged = flipped(&canonical, bit);
        let error = wire.upload(&damaged, UploadFormat::Canonical, digest).await;
        let error = error.expect_err("it is not what was announced");
        assert_error(&error, ErrorCode::LoraRejected, &["digest", &adapter.to_string()]);

        // Undeclared, it is its own content or none.
        match wire.upload(&damaged, UploadFormat::Canonical, None).await {
            Ok(reply) => {
                assert_eq!(reply.adapter, Some(AdapterId::of(&damaged)));
                renamed += 1;
            }
            Err(error) => {
                let codes = [ErrorCode::LoraRejected, ErrorCode::Unsupported, ErrorCode::TooLarge];
                assert!(codes.contains(&error.code), "bit {bit}: {}", error.message);
                rejected += 1;
            }
        }
    }
    assert!(rejected > 0 && renamed > 0, "{rejected} rejected, {renamed} are other adapters");
    let held = farm.client.has_lora(&[adapter]).await.expect("the broker answers");
    assert_eq!(held.missing, [adapter], "nothing goes by the name of the original");
    let words = [&*format!("`{adapter}`")];
    let request = base_request().lora(adapter, 1.0);
    farm.assert_refuses(request, ErrorCode::UnknownLora, &words).await;
}

#[tokio::test]
async fn a_file_that_is_no_safetensors_is_rejected_and_a_pickle_by_its_name() {
    let mut farm = Farm::start().await;
    let mut wire = farm.wire().await;
    for (bytes, word) in [
        (&b"PK\x03\x04 a zip archive as torch writes it"[..], "pickle"),
        (b"\x80\x02}q\x00.", "pickle"),
        (b"GGUF and what not", "not a safetensors file"),
        (b"\xff\xff\xff\xff\xff\xff\xff\x7f{}", "header"),
        (b"\x02\0\0\0\0\0\0\0[]", "not a safetensors file"),
    ] {
        let error = wire.upload(bytes, UploadFormat::Lora, None).await.expect_err(word);
        let codes = [ErrorCode::LoraRejected, ErrorCode::TooLarge];
        assert!(codes.contains(&error.code), "{}: {}", error.code, error.message);
        assert_error(&error, error.code, &[word]);
        let error = wire.upload(bytes, UploadFormat::Canonical, None).await;
        assert!(codes.contains(&error.expect_err(word).code));
    }
    let error = wire.upload(&kohya(), UploadFormat::Canonical, None).await;
    let error = error.expect_err("a file as it lies on disk is not canonical");
    assert_error(&error, ErrorCode::LoraRejected, &["luna-adapter/1"]);
    assert_nothing_stored(&mut farm).await;
}

#[tokio::test]
async fn steps_that_are_out_of_order_are_refused() {
    let mut farm = Farm::start().await;
    let mut wire = farm.wire().await;
    let invalid = ErrorCode::InvalidRequest;
    let upload = wire.begin(10, UploadFormat::Lora, None).await.expect("it may begin");
    let chunk = |offset| UploadOp::Chunk { upload: upload.clone(), offset };
    let bytes = |length: usize| vec![Bytes::from(vec![0; length])];
    for (op, attachments, words) in [
        (chunk(5), bytes(5), ["offset 5", "expected 0"]),
        (chunk(0), bytes(11), ["ends at byte 11", "10 bytes"]),
        (chunk(0), bytes(0), ["the chunk", "empty"]),
        (chunk(0), vec![], ["0 attachments", "exactly one"]),
        (chunk(0), [bytes(5), bytes(5)].concat(), ["2 attachments", "exactly one"]),
    ] {
        let error = wire.upload_step(op, attachments).await.expect_err(words[0]);
        assert_error(&error, invalid, &words);
    }
    let error = wire.upload_step(chunk(0), bytes((1 << 20) + 1)).await.expect_err("too much");
    assert_error(&error, ErrorCode::TooLarge, &["1048577", "1048576"]);

    let mut other = farm.wire().await;
    for op in [chunk(0), UploadOp::Commit { upload: upload.clone() }] {
        let error = other.upload_step(op, bytes(5)).await.expect_err("it is not its upload");
        assert_error(&error, invalid, &[upload.as_str(), "not open"]);
    }
    wire.upload_step(UploadOp::Abort { upload: upload.clone(), keep: false }, vec![])
        .await
        .expect("it ends");
    let error = wire.upload_step(chunk(0), bytes(10)).await.expect_err("it has ended");
    assert_error(&error, invalid, &[upload.as_str(), "not open"]);
    assert_nothing_stored(&mut farm).await;
}

#[tokio::test]
async fn an_announcement_that_cannot_be_kept_is_refused_at_once() {
    let mut farm = Farm::start().await;
    let mut wire = farm.wire().await;
    for (size, label, code, words) in [
        (0, None, ErrorCode::InvalidRequest, ["`size` is 0", "empty"]),
        ((2 << 30) + 1, None, ErrorCode::TooLarge, ["2147483649", "2147483648"]),
        (10, Some("x".repeat(129)), ErrorCode::TooLarge, ["`label` has 129", "128"]),
    ] {
        let begin = UploadOp::Begin { size, format: UploadFormat::Lora, digest: None, label };
        let error = wire.upload_step(begin, Vec::new()).await.expect_err(words[0]);
        assert_error(&error, code, &words);
    }
    assert_nothing_stored(&mut farm).await;
}

/// Asserts that the farm goes on and holds no adapter.
async fn assert_nothing_stored(farm: &mut Farm) {
    assert_eq!(farm.client.list_loras().await.expect("the broker answers"), []);
    farm.assert_serves().await;
}

fn kohya() -> Bytes {
    std::fs::read(tiny_lora("sd15", "kohya"))
        .expect("the golden LoRAs are in the repository")
        .into()
}
