//! Every limit of the wire in one place. Going over one is answered with a typed error.

/// Bytes of a header frame.
pub const HEADER_BYTES_MAX: usize = 1 << 20;
/// Nesting of a header's maps and arrays.
pub const HEADER_DEPTH_MAX: usize = 16;
/// Frames of one message.
pub const FRAMES_MAX: usize = 72;
/// Bytes of one attachment of a client.
pub const ATTACHMENT_BYTES_MAX: usize = 8 << 20;
/// Bytes of one upload chunk and of one blob chunk.
pub const UPLOAD_CHUNK_BYTES_MAX: usize = 1 << 20;
/// Bytes of one uploaded file.
pub const UPLOAD_BYTES_MAX: u64 = 2 << 30;
/// Bytes of one uploaded file of a model.
pub const MODEL_BYTES_MAX: u64 = 8 << 30;
/// Bytes of the path of a model's file.
pub const PATH_BYTES_MAX: usize = 4096;
/// Adapters that a worker's inventory lists; those that are nearest come first.
pub const INVENTORY_ADAPTERS_MAX: usize = 8192;
/// Earlier processes that a worker tells of.
pub const DEATHS_MAX: usize = 64;
/// Requests that all of them together were busy with.
pub const DEATHS_BUSY_MAX: usize = 512;
/// Bytes of the label that people see for an adapter.
pub const LABEL_BYTES_MAX: usize = 128;
/// Adapters named in one `warm`.
pub const WARM_ADAPTERS_MAX: usize = 256;
/// Bytes of the reason for a drain.
pub const REASON_BYTES_MAX: usize = 256;
/// Prompts in one request.
pub const PROMPTS_MAX: usize = 32;
/// Bytes of one prompt's text.
pub const PROMPT_BYTES_MAX: usize = 64 << 10;
/// Chunks of one prompt for one component.
pub const CHUNKS_MAX: usize = 32;
/// Chunks of one request, over all prompts and components.
pub const REQUEST_CHUNKS_MAX: usize = 128;
/// Bytes of all vectors of one request; several prompts may refer to one attachment.
pub const REQUEST_VECTORS_BYTES_MAX: u64 = 64 << 20;
/// Entries of one stack.
pub const STACK_ENTRIES_MAX: usize = 256;
/// Largest absolute strength of a stack entry.
pub const STRENGTH_MAX: f64 = 1000.0;
/// Adapters named in one `has_lora` or `evict_lora`, and in one `prefetch`.
pub const ADAPTERS_MAX: usize = 4096;
/// Longest time budget of a request.
pub const BUDGET_MS_MAX: u32 = 600_000;
/// Time budget of a request that names none.
pub const BUDGET_MS_DEFAULT: u32 = 30_000;
