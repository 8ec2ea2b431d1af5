//! The command line: every command, flag and help text.

#![expect(clippy::doc_markdown, reason = "the comments on flags are help texts for a terminal")]

mod bench;

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use luna_client::DEFAULT_ENDPOINT;
use protocol::{AdapterId, Dtype, ExecutionMode, Family, Fidelity, ModelName, WorkerName};
use settings::Time;
use worker::model::ModelSpec;

pub(crate) use self::bench::{BenchBrokerArgs, BenchOverloadArgs};

/// A farm of workers that encode text with shared CLIP models, with any stack of LoRAs per request.
#[derive(Debug, Parser)]
#[command(name = "luna", version, propagate_version = true, arg_required_else_help = true)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    #[command(flatten)]
    Farm(FarmCommand),
    /// Measure a broker on this machine; it starts one of its own
    #[command(subcommand)]
    Bench(BenchCommand),
    /// Run a broker alone; `luna up` starts one for you
    #[command(disable_help_flag = true, disable_version_flag = true)]
    Broker(PassedOn),
    /// Run a worker alone; `luna up` starts them for you
    #[command(disable_help_flag = true, disable_version_flag = true)]
    Worker(PassedOn),
}

/// What is measured.
#[derive(Debug, Subcommand)]
pub(crate) enum BenchCommand {
    /// Throughput, latency, CPU time and memory of a broker whose workers answer at once
    Broker(BenchBrokerArgs),
    /// Goodput, rejections and fairness of a broker that is asked for more than its workers can do
    Overload(BenchOverloadArgs),
}

/// What people do with a farm.
#[derive(Debug, Subcommand)]
pub(crate) enum FarmCommand {
    /// Start a farm here: a broker, and workers that compute on the CPU
    Up(UpArgs),
    /// Start a farm of two workers with seeded models and show LoRAs at work
    Demo(DemoArgs),
    /// Encode a prompt and write the conditioning to a safetensors file
    Encode(EncodeArgs),
    /// Upload, list and evict LoRAs
    #[command(subcommand)]
    Lora(LoraCommand),
    /// List and register models
    #[command(subcommand)]
    Model(ModelCommand),
    /// Have workers bring LoRAs into memory before requests need them
    Warm(WarmArgs),
    /// Have a worker or the broker take nothing new and finish what it has
    #[command(subcommand)]
    Drain(DrainCommand),
    /// Show how the farm is; exits 0 when it is ready, else 1
    Status(StatusArgs),
    /// Show where a request would go now and why; exits 0 when a worker would take it, else 1
    Explain(ExplainArgs),
    /// Write seeded models, LoRAs and embeddings for tests
    Fixtures(FixturesArgs),
}

/// Arguments that another program understands.
#[derive(Debug, Args)]
pub(crate) struct PassedOn {
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, hide = true)]
    pub(crate) arguments: Vec<String>,
}

/// Where the farm is.
#[derive(Debug, Clone, Args)]
pub(crate) struct FarmArgs {
    /// The farm's endpoint: tcp://HOST:PORT or ipc://PATH
    #[arg(long, env = "LUNA_ENDPOINT", default_value = DEFAULT_ENDPOINT, value_name = "URL")]
    pub(crate) endpoint: String,
    /// Longest time to wait for an answer
    #[arg(long, default_value = "60s", value_name = "TIME")]
    pub(crate) timeout: Time,
}

#[derive(Debug, Args)]
pub(crate) struct UpArgs {
    /// A model to serve; FAMILY is sd15 or sdxl, FILE a checkpoint or a stand-alone text encoder
    #[arg(long = "model", value_name = "NAME=FAMILY:FILE[,FILE]")]
    pub(crate) models: Vec<ModelSpec>,
    /// Directory of textual-inversion files for `embedding:NAME` in prompts
    #[arg(long, value_name = "DIR")]
    pub(crate) embeddings: Option<PathBuf>,
    /// Number of workers [default: 1]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=64))]
    pub(crate) workers: Option<u32>,
    /// Where clients connect: tcp://127.0.0.1:PORT or ipc://PATH [default: tcp://127.0.0.1:19283]
    #[arg(long, env = "LUNA_ENDPOINT", value_name = "URL")]
    pub(crate) endpoint: Option<String>,
    /// How weights are stored: float16, float32 or bfloat16 [default: float16]
    #[arg(long, value_name = "DTYPE")]
    pub(crate) weights_dtype: Option<Dtype>,
    /// Requests that each worker computes at once
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=64))]
    pub(crate) lanes: Option<u32>,
    /// How stacks are applied where a request does not say: auto, locking or functional
    #[arg(long, value_name = "MODE")]
    pub(crate) execution_mode: Option<ExecutionMode>,
    /// How merged weights are rounded where a request does not say: comfyui or exact
    #[arg(long, value_name = "FIDELITY")]
    pub(crate) fidelity: Option<Fidelity>,
    /// Directory in which workers keep adapters on disk; several get a directory each in it
    #[arg(long, value_name = "DIR")]
    pub(crate) cache: Option<PathBuf>,
    /// A directory from which `luna model register` may have models read; may be repeated
    #[arg(long = "model-root", value_name = "DIR")]
    pub(crate) model_roots: Vec<PathBuf>,
    /// CPU threads of each worker [default: cores divided by workers]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub(crate) threads: Option<u32>,
    /// Directory of the blob store [default: $XDG_STATE_HOME/luna]
    #[arg(long, value_name = "DIR")]
    pub(crate) store: Option<PathBuf>,
    /// Executable to start as worker, for example one built for CUDA [default: this one]
    #[arg(long, value_name = "PATH")]
    pub(crate) worker_exe: Option<PathBuf>,
    /// How long a process may take to finish what it has when the farm stops [default: 30s]
    #[arg(long, value_name = "TIME")]
    pub(crate) grace: Option<Time>,
    /// Log lines as JSON objects
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct DemoArgs {
    /// Keep the models, logs and results in this directory, and find them there the next time
    #[arg(long, value_name = "DIR")]
    pub(crate) dir: Option<PathBuf>,
    /// Small models instead of CLIP-L at its true size: done in a moment
    #[arg(long)]
    pub(crate) tiny: bool,
    /// Print the table as JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
#[expect(clippy::struct_excessive_bools, reason = "every flag is one")]
pub(crate) struct EncodeArgs {
    #[command(flatten)]
    pub(crate) farm: FarmArgs,
    /// The model's name, see `luna model ls`
    #[arg(long, value_name = "NAME")]
    pub(crate) model: ModelName,
    /// The prompt, in ComfyUI's syntax
    #[arg(
        long,
        value_name = "TEXT",
        allow_hyphen_values = true,
        required_unless_present = "prompt_l"
    )]
    pub(crate) prompt: Option<String>,
    /// The prompt for CLIP-L alone, with another one for CLIP-G
    #[arg(
        long,
        value_name = "TEXT",
        allow_hyphen_values = true,
        conflicts_with = "prompt",
        requires = "prompt_g"
    )]
    pub(crate) prompt_l: Option<String>,
    /// The prompt for CLIP-G alone, with another one for CLIP-L
    #[arg(
        long,
        value_name = "TEXT",
        allow_hyphen_values = true,
        conflicts_with = "prompt",
        requires = "prompt_l"
    )]
    pub(crate) prompt_g: Option<String>,
    /// A LoRA to apply: a file, or the digest of one that the farm holds; may be repeated
    #[arg(long = "lora", value_name = "FILE:STRENGTH")]
    pub(crate) loras: Vec<LoraArg>,
    /// Stop at this layer, counted from the end, as ComfyUI's "CLIP Set Last Layer" does
    #[arg(long, value_name = "N", allow_negative_numbers = true, value_parser = clap::value_parser!(i32).range(-24..=-1))]
    pub(crate) clip_skip: Option<i32>,
    /// Leave the pooled output unprojected
    #[arg(long)]
    pub(crate) unprojected: bool,
    /// How the stack is applied: auto, locking or functional
    #[arg(long, value_name = "MODE")]
    pub(crate) mode: Option<ExecutionMode>,
    /// How merged weights are rounded: comfyui or exact
    #[arg(long, value_name = "FIDELITY")]
    pub(crate) fidelity: Option<Fidelity>,
    /// Accept LoRAs with text-encoder keys that the model does not have; they are warned of
    #[arg(long)]
    pub(crate) lenient: bool,
    /// Compute it even if the farm still has the answer to an equal request
    #[arg(long)]
    pub(crate) no_cache: bool,
    /// The safetensors file to write: tensors `cond` and `pooled`
    #[arg(short, long, value_name = "OUT.safetensors")]
    pub(crate) output: PathBuf,
    /// Print the receipt as JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum LoraCommand {
    /// Upload LoRA files; what the farm already holds is not sent again
    Push(LoraPushArgs),
    /// List the LoRAs that the farm holds
    Ls(ListArgs),
    /// Take LoRAs out of the workers' memory
    Evict(LoraEvictArgs),
}

#[derive(Debug, Args)]
pub(crate) struct LoraPushArgs {
    #[command(flatten)]
    pub(crate) farm: FarmArgs,
    /// The files: safetensors in any of the usual spellings
    #[arg(required = true, value_name = "FILE")]
    pub(crate) files: Vec<PathBuf>,
    /// Print the outcome as JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct LoraEvictArgs {
    #[command(flatten)]
    pub(crate) farm: FarmArgs,
    /// The adapters' digests, see `luna lora ls`
    #[arg(required = true, value_name = "DIGEST")]
    pub(crate) adapters: Vec<AdapterId>,
    /// Delete them from the blob store as well
    #[arg(long)]
    pub(crate) delete: bool,
    /// Print the outcome as JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum ModelCommand {
    /// List the models that workers serve
    Ls(ListArgs),
    /// Have the workers serve one more model
    Register(ModelRegisterArgs),
}

#[derive(Debug, Args)]
pub(crate) struct ModelRegisterArgs {
    #[command(flatten)]
    pub(crate) farm: FarmArgs,
    /// What to call the model
    #[arg(value_name = "NAME")]
    pub(crate) name: ModelName,
    /// Which text encoders it has: sd15 or sdxl
    #[arg(value_name = "FAMILY")]
    pub(crate) family: Family,
    /// A checkpoint or a stand-alone text encoder, or one text encoder for every component; a path
    /// on the workers' machines, in a directory that they allow (--model-root), unless --upload
    #[arg(required = true, value_name = "FILE")]
    pub(crate) files: Vec<PathBuf>,
    /// The files are here: send them to the farm first; what it already holds is not sent again
    #[arg(long)]
    pub(crate) upload: bool,
    /// Print the outcome as JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct ListArgs {
    #[command(flatten)]
    pub(crate) farm: FarmArgs,
    /// Print the list as JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct WarmArgs {
    #[command(flatten)]
    pub(crate) farm: FarmArgs,
    /// The adapters' digests, see `luna lora ls`
    #[arg(required = true, value_name = "DIGEST")]
    pub(crate) adapters: Vec<AdapterId>,
    /// The model that they will be used with [default: the one that most workers serve]
    #[arg(long, value_name = "NAME")]
    pub(crate) model: Option<ModelName>,
    /// How many workers are to have each of them
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) workers: u32,
    /// Wait until they are there, for at most this time; exits 1 when one is not
    #[arg(long, value_name = "TIME")]
    pub(crate) wait: Option<Time>,
    /// Print the outcome as JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum DrainCommand {
    /// Drain a worker; others fetch the LoRAs that it alone has in memory
    Worker(DrainWorkerArgs),
    /// Drain the broker; new requests are answered `overloaded`
    Broker(DrainArgs),
}

#[derive(Debug, Args)]
pub(crate) struct DrainWorkerArgs {
    /// The worker's name, see `luna status`
    #[arg(value_name = "NAME")]
    pub(crate) name: WorkerName,
    #[command(flatten)]
    pub(crate) drain: DrainArgs,
}

#[derive(Debug, Args)]
pub(crate) struct DrainArgs {
    #[command(flatten)]
    pub(crate) farm: FarmArgs,
    /// Why: it stands in `luna status`, in errors and in logs
    #[arg(long, value_name = "TEXT", conflicts_with = "undo")]
    pub(crate) reason: Option<String>,
    /// Take requests again
    #[arg(long)]
    pub(crate) undo: bool,
    /// Print the outcome as JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct StatusArgs {
    #[command(flatten)]
    pub(crate) farm: FarmArgs,
    /// Wait until the farm is ready, at most for the timeout
    #[arg(long)]
    pub(crate) wait: bool,
    /// Print the status as JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct ExplainArgs {
    #[command(flatten)]
    pub(crate) farm: FarmArgs,
    /// The model's name, see `luna model ls`
    #[arg(long, value_name = "NAME")]
    pub(crate) model: ModelName,
    /// Digest of a LoRA of the stack, see `luna lora ls`; may be repeated
    #[arg(long = "lora", value_name = "DIGEST")]
    pub(crate) loras: Vec<AdapterId>,
    /// Chunks of 77 tokens, of all prompts and components together
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) chunks: u32,
    /// Print the verdicts as JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct FixturesArgs {
    /// The directory to write to
    #[arg(value_name = "DIR")]
    pub(crate) directory: PathBuf,
    /// Which sizes to write
    #[arg(long, value_enum, default_value_t = FixtureSize::All)]
    pub(crate) size: FixtureSize,
    /// How full-size weights are written: float16, float32 or bfloat16 (tiny ones are float32)
    #[arg(long, default_value_t = Dtype::Float16, value_name = "DTYPE")]
    pub(crate) weights_dtype: Dtype,
}

/// Which seeded models to write.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum FixtureSize {
    /// A few layers of a few dozen features: 14 MB
    Tiny,
    /// CLIP-L and bigG at their true sizes: about 1.6 GB in float16
    Full,
    /// Both
    All,
}

/// A LoRA on the command line and its strength.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct LoraArg {
    pub(crate) source: LoraSource,
    pub(crate) strength: f64,
}

/// Where a LoRA comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum LoraSource {
    /// A file here, uploaded if the farm lacks it.
    File(PathBuf),
    /// An adapter that the farm holds.
    Adapter(AdapterId),
}

impl std::str::FromStr for LoraArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (source, strength) = match text.rsplit_once(':') {
            Some((source, strength)) => (source, strength),
            None => (text, "1"),
        };
        let number = strength.parse::<f64>().ok().filter(|strength| strength.is_finite());
        let strength = number.ok_or_else(|| {
            format!("`{strength}` is not a strength: write FILE:STRENGTH, for example style.safetensors:0.8")
        })?;
        if source.is_empty() {
            return Err("the file is missing: write FILE:STRENGTH".to_owned());
        }
        let source = match source.parse() {
            Ok(adapter) => LoraSource::Adapter(adapter),
            Err(_) => LoraSource::File(PathBuf::from(source)),
        };
        Ok(Self { source, strength })
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_lora_is_a_file_or_a_digest_with_a_strength() {
        let lora = |text: &str| text.parse::<LoraArg>();
        let file = |path: &str| LoraSource::File(PathBuf::from(path));
        assert_eq!(
            lora("a.safetensors:0.8"),
            Ok(LoraArg { source: file("a.safetensors"), strength: 0.8 })
        );
        assert_eq!(lora("a:b:-1"), Ok(LoraArg { source: file("a:b"), strength: -1.0 }));
        assert_eq!(lora("a.safetensors").unwrap().strength.to_bits(), 1.0_f64.to_bits());
        let id = AdapterId::of(b"x");
        assert_eq!(lora(&format!("{id}:1")).unwrap().source, LoraSource::Adapter(id));
        assert!(lora("a:nan").is_err() && lora("a:strong").is_err() && lora(":1").is_err());
    }
}
