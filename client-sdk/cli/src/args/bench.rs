//! Flags of `luna bench`.

use std::{path::PathBuf, time::Duration};

use clap::Args;
use settings::Time;

#[derive(Debug, Args)]
pub(crate) struct BenchBrokerArgs {
    /// Time of every measurement
    #[arg(long, default_value = "3s", value_name = "TIME", value_parser = bench_time)]
    pub(crate) duration: Time,
    /// Numbers of requests in flight
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "1,64,256",
        value_name = "N,N",
        value_parser = clap::value_parser!(u32).range(1..=1024)
    )]
    pub(crate) in_flight: Vec<u32>,
    /// Bytes of requests and of their replies
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "64:64,256:241664",
        value_name = "REQUEST:REPLY"
    )]
    pub(crate) sizes: Vec<SizesArg>,
    /// Idle clients to connect in the end; 0 leaves that out
    #[arg(
        long,
        default_value_t = 1000,
        value_name = "N",
        value_parser = clap::value_parser!(u32).range(..=10_000)
    )]
    pub(crate) idle_clients: u32,
    /// A Python with pyzmq, for the libzmq proxy to compare with
    #[arg(long, env = "LUNA_PYTHON", default_value = "python3", value_name = "PATH")]
    pub(crate) python: PathBuf,
    /// Executable whose `broker` is measured [default: this one]
    #[arg(long, value_name = "PATH")]
    pub(crate) broker_exe: Option<PathBuf>,
    /// Print the report as JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct BenchOverloadArgs {
    /// Time of every load, without its first second
    #[arg(long, default_value = "4s", value_name = "TIME", value_parser = bench_time)]
    pub(crate) duration: Time,
    /// Workers, each of which takes one request at a time
    #[arg(long, default_value_t = 8, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=64))]
    pub(crate) workers: u32,
    /// How long a worker works on a request
    #[arg(long, default_value = "5ms", value_name = "TIME", value_parser = bench_time)]
    pub(crate) service: Time,
    /// Time after which an answer is of no use
    #[arg(long, default_value = "2s", value_name = "TIME", value_parser = bench_time)]
    pub(crate) budget: Time,
    /// Executable whose `broker` is measured [default: this one]
    #[arg(long, value_name = "PATH")]
    pub(crate) broker_exe: Option<PathBuf>,
    /// Print the report as JSON
    #[arg(long)]
    pub(crate) json: bool,
}

/// A time that something is measured for: more than none, and no more than ten minutes.
fn bench_time(text: &str) -> Result<Time, String> {
    let time: Time = text.parse().map_err(|error: settings::InvalidTime| error.to_string())?;
    if (Duration::from_millis(1)..=Duration::from_mins(10)).contains(&time.0) {
        Ok(time)
    } else {
        Err("write a time from 1ms to 10m".to_owned())
    }
}

/// Sizes of messages on the command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct SizesArg(pub(crate) bench::Sizes);

impl std::str::FromStr for SizesArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let advice = || {
            format!("`{text}` are no sizes: write REQUEST:REPLY in bytes, for example 256:241664")
        };
        let (request, reply) = text.split_once(':').ok_or_else(advice)?;
        let bytes = |text: &str| text.parse().map_err(|_| advice());
        Ok(Self(bench::Sizes { request_bytes: bytes(request)?, reply_bytes: bytes(reply)? }))
    }
}
