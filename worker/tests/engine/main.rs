//! The engine against results of ComfyUI, against candle's own CLIP, and against bad files.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on must stop")]

mod cases;
mod cross_check;
mod golden;
mod kinds;
mod loading;
mod long_clip;
mod models;
mod stacks;
