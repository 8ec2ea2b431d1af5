//! The directories that clients may name model files in.
//!
//! What lies outside of the directories is refused in one way, whether or not it exists, so nobody
//! learns a machine's files by asking: a name that a client chose is looked up only inside of them.
//! **Invariant:** a path that is handed out has no links and lies in one of the directories, as far
//! as the moment of asking goes: whoever may write there can put another file in its place, and may
//! do that anyway.

use std::{
    fs, io,
    path::{self, Component, Path, PathBuf},
};

use protocol::{ErrorCode, limits};

use super::failure::WireError;

/// Directories that clients may name model files in; without any, every path is refused.
#[derive(Debug, Clone, Default)]
pub struct ModelRoots {
    roots: Vec<Root>,
}

/// One directory.
#[derive(Debug, Clone)]
struct Root {
    /// As the operator wrote it.
    given: PathBuf,
    /// Without links.
    real: PathBuf,
}

/// A directory that cannot be one of the [`ModelRoots`].
#[derive(Debug, thiserror::Error)]
#[error("`{}` cannot be used as `--model-root`: name a directory that exists", path.display())]
pub struct InvalidRoot {
    /// The directory.
    pub path: PathBuf,
    /// What the system says.
    pub source: io::Error,
}

/// Why a worker does not take a model file by this path.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RefusedPath {
    /// The path is longer than any that is looked up.
    #[error("the path has {bytes} bytes: at most {most} are accepted", most = limits::PATH_BYTES_MAX)]
    TooLong {
        /// Bytes of the path.
        bytes: usize,
    },
    /// The path depends on where a worker was started, or leads upwards.
    #[error("`{path}` is not a plain path: name the file from `/` on, without `..`")]
    NotPlain {
        /// As the client wrote it.
        path: String,
    },
    /// The path does not stay in the directories, or there are none. Says nothing about the file.
    #[error(
        "`{path}` is not in a directory that this worker takes models from: start the worker with \
         `--model-root DIR`, or upload the file"
    )]
    Forbidden {
        /// As the client wrote it.
        path: String,
    },
    /// There is no such file.
    #[error("there is no file `{path}` on this worker's machine")]
    NotFound {
        /// As the client wrote it.
        path: String,
    },
    /// There is something else than a file.
    #[error("`{path}` is not a file: name the safetensors file itself")]
    NotAFile {
        /// As the client wrote it.
        path: String,
    },
    /// The system does not let the worker look.
    #[error("cannot look up `{path}`")]
    Unreadable {
        /// As the client wrote it.
        path: String,
        /// What the system says.
        source: io::Error,
    },
}

impl ModelRoots {
    /// Allows these directories and all below them.
    ///
    /// # Errors
    /// When one is not a directory.
    pub fn new(directories: impl IntoIterator<Item = PathBuf>) -> Result<Self, InvalidRoot> {
        let root = |path: PathBuf| {
            let given = path::absolute(&path);
            match given.and_then(|given| Ok(Root { real: fs::canonicalize(&given)?, given })) {
                Ok(root) if root.real.is_dir() => Ok(root),
                Ok(_) => Err(InvalidRoot { path, source: io::ErrorKind::NotADirectory.into() }),
                Err(source) => Err(InvalidRoot { path, source }),
            }
        };
        Ok(Self { roots: directories.into_iter().map(root).collect::<Result<_, _>>()? })
    }

    /// The file that the path `asked` names, without links.
    ///
    /// # Errors
    /// When the path is not absolute, leaves the directories, or is no file's.
    pub fn resolve(&self, asked: &str) -> Result<PathBuf, RefusedPath> {
        let path = || asked.to_owned();
        let bytes = asked.len();
        if bytes > limits::PATH_BYTES_MAX {
            return Err(RefusedPath::TooLong { bytes });
        }
        let plain = Path::new(asked);
        if !plain.is_absolute() || plain.components().any(|part| part == Component::ParentDir) {
            return Err(RefusedPath::NotPlain { path: path() });
        }
        let forbidden = || RefusedPath::Forbidden { path: path() };
        let (mut at, rest) = self.inside(plain).ok_or_else(forbidden)?;
        for name in rest {
            if !self.allows(&at) {
                return Err(forbidden());
            }
            let next = at.join(name);
            at = match fs::canonicalize(&next) {
                Ok(found) => found,
                // Whether its end exists is not for clients to know.
                Err(_) if next.is_symlink() => return Err(forbidden()),
                Err(error) if is_absence(&error) => {
                    return Err(RefusedPath::NotFound { path: path() });
                }
                Err(source) => return Err(RefusedPath::Unreadable { path: path(), source }),
            };
        }
        if !self.allows(&at) {
            return Err(forbidden());
        }
        if at.is_file() { Ok(at) } else { Err(RefusedPath::NotAFile { path: path() }) }
    }

    /// The directory that `path` names first, and the way on from there. Looks nothing up.
    fn inside<'a>(&self, path: &'a Path) -> Option<(PathBuf, &'a Path)> {
        self.roots.iter().find_map(|Root { given, real }| {
            let rest = path.strip_prefix(real).or_else(|_| path.strip_prefix(given)).ok()?;
            Some((real.clone(), rest))
        })
    }

    fn allows(&self, path: &Path) -> bool {
        self.roots.iter().any(|root| path.starts_with(&root.real))
    }
}

impl WireError for RefusedPath {
    fn code(&self) -> ErrorCode {
        match self {
            Self::TooLong { .. } => ErrorCode::TooLarge,
            Self::Forbidden { .. } => ErrorCode::Forbidden,
            Self::NotPlain { .. } | Self::NotFound { .. } | Self::NotAFile { .. } => {
                ErrorCode::InvalidRequest
            }
            Self::Unreadable { .. } => ErrorCode::Internal,
        }
    }
}

/// Whether an error means that there is nothing of that name.
fn is_absence(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn a_file_inside_is_found_by_every_way_that_leads_there() {
        let farm = Farm::new();
        let file = farm.path("models/sub/clip.safetensors");
        for way in [
            "models/sub/clip.safetensors",
            "models/./sub//clip.safetensors",
            "models/inner",
            "models/sub/relative",
            "models/around/clip.safetensors",
        ] {
            assert_eq!(farm.roots.resolve(&farm.text(way)).unwrap(), file, "{way}");
        }
        let alias = ModelRoots::new([farm.path("alias")]).unwrap();
        for way in ["models/inner", "alias/inner", "alias/sub/clip.safetensors"] {
            assert_eq!(alias.resolve(&farm.text(way)).unwrap(), file, "{way}");
        }
    }

    #[test]
    fn what_is_outside_is_refused_alike_whether_or_not_it_exists() {
        let farm = Farm::new();
        for way in [
            "elsewhere/secret",
            "elsewhere/nothing",
            "elsewhere",
            "nothing/at/all",
            "elsewhere/secret/below",
            "models-of-others/clip.safetensors",
            "models/out",
            "models/out/secret",
            "models/out/nothing",
            "models/out/back/clip.safetensors",
            "models/out/nothing/clip.safetensors",
            "alias/sub/clip.safetensors",
            "nothing/sub/clip.safetensors",
            "models/out/loop",
            "models/dangling",
            "models/loop",
        ] {
            let path = farm.text(way);
            let refused = farm.roots.resolve(&path).unwrap_err();
            let expected = format!(
                "forbidden: `{path}` is not in a directory that this worker takes models from: \
                 start the worker with `--model-root DIR`, or upload the file"
            );
            assert_eq!(refused.to_failure().to_string(), expected);
        }
    }

    #[test]
    fn inside_the_refusal_says_what_is_wrong() {
        let farm = Farm::new();
        let refusal = |way: &str| farm.roots.resolve(&farm.text(way)).unwrap_err();
        for missing in ["models/nothing", "models/sub/nothing/x", "models/inner/x"] {
            let refused = refusal(missing);
            assert!(matches!(refused, RefusedPath::NotFound { .. }), "{missing}: {refused}");
            assert_eq!(refused.code(), ErrorCode::InvalidRequest);
        }
        for other in ["models", "models/sub", "models/around"] {
            let refused = refusal(other);
            assert!(matches!(refused, RefusedPath::NotAFile { .. }), "{other}: {refused}");
            assert_eq!(refused.code(), ErrorCode::InvalidRequest);
        }
    }

    #[test]
    fn a_path_is_absolute_and_plain_and_short() {
        let farm = Farm::new();
        let upwards =
            ["models/sub/../inner", "elsewhere/../models/inner", "nothing/../models/inner"]
                .map(|way| farm.text(way));
        let relative = ["models/sub/clip.safetensors", "", "./x", "../x"].map(str::to_owned);
        for path in upwards.iter().chain(&relative) {
            let refused = farm.roots.resolve(path).unwrap_err();
            assert_eq!(refused.code(), ErrorCode::InvalidRequest, "{path}");
            assert!(matches!(refused, RefusedPath::NotPlain { .. }), "{path}: {refused}");
        }
        let long = format!("/{}", "x".repeat(limits::PATH_BYTES_MAX));
        assert_eq!(farm.roots.resolve(&long).unwrap_err().code(), ErrorCode::TooLarge);
        let nul = farm.text("models/a\0b");
        assert_eq!(farm.roots.resolve(&nul).unwrap_err().code(), ErrorCode::Internal);
    }

    #[test]
    fn without_directories_nothing_is_allowed() {
        let farm = Farm::new();
        let path = farm.text("models/sub/clip.safetensors");
        let refused = ModelRoots::default().resolve(&path).unwrap_err();
        assert_eq!(refused.code(), ErrorCode::Forbidden);
        for path in ["models/nothing", "models/inner"] {
            let error = ModelRoots::new([farm.path(path)]).unwrap_err();
            assert!(error.to_string().contains(path), "{error}");
        }
    }

    /// A directory of models beside one that is nobody's business.
    struct Farm {
        folder: tempfile::TempDir,
        roots: ModelRoots,
    }

    impl Farm {
        fn new() -> Self {
            let folder = tempfile::tempdir().unwrap();
            let path = |name: &str| fs::canonicalize(folder.path()).unwrap().join(name);
            for directory in ["models/sub", "elsewhere", "models-of-others"] {
                fs::create_dir_all(path(directory)).unwrap();
            }
            for file in [
                "models/sub/clip.safetensors",
                "models-of-others/clip.safetensors",
                "elsewhere/secret",
            ] {
                fs::write(path(file), b"x").unwrap();
            }
            for (target, link) in [
                (path("models"), "alias"),
                (path("alias/sub"), "models/around"),
                (path("models/sub"), "elsewhere/back"),
                (path("models/sub/clip.safetensors"), "models/inner"),
                ("../sub/./clip.safetensors".into(), "models/sub/relative"),
                (path("elsewhere"), "models/out"),
                (path("elsewhere/nothing"), "models/dangling"),
                (path("models/loop"), "models/loop"),
                (path("elsewhere/loop"), "elsewhere/loop"),
            ] {
                symlink(target, path(link)).unwrap();
            }
            let roots = ModelRoots::new([path("models")]).unwrap();
            Self { folder, roots }
        }

        fn path(&self, name: &str) -> PathBuf {
            fs::canonicalize(self.folder.path()).unwrap().join(name)
        }

        fn text(&self, name: &str) -> String {
            self.path(name).to_str().unwrap().to_owned()
        }
    }
}
