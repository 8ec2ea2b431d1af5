//! The tensors of one patch by the name of their part, and how they become a patch.
//!
//! A LoRA-like file and the canonical form name tensors differently; both are brought to the names
//! of parts here, so that shapes, types and limits are checked in one place, from headers alone.

use std::collections::BTreeMap;

use crate::{
    array::Array,
    container::Container,
    error::AdapterError,
    limits::Limits,
    matrix::Matrix,
    patch::{
        Boft, Diff, Factor, FactorShape, Fit, Glora, Hadamard, Kronecker, LowRank, ModelAsLora,
        Oft, Patch, PatchError, PatchKind, SetWeight, check_shapes, fit_boft, fit_glora,
        fit_hadamard, fit_kronecker, fit_oft,
    },
    source::ByteSource,
    tensor::Tensor,
};

/// The scalar that scales a patch; always optional.
pub(crate) const ALPHA: &str = "alpha";
/// The magnitudes of a weight-decomposed patch; always optional.
pub(crate) const DORA_SCALE: &str = "dora_scale";
/// The one part of patches that hold every element.
pub(crate) const VALUE: &str = "value";
/// The one part, without elements, of patches that change nothing: a target needs some tensor.
pub(crate) const MARK: &str = "mark";

/// The [out, rank] matrix of a low-rank patch.
pub(crate) const UP: &str = "up";
/// The [rank, in] matrix of a low-rank patch.
pub(crate) const DOWN: &str = "down";
/// The [rank, rank] matrix between them, in some files.
pub(crate) const MID: &str = "mid";

/// One patch whose needed parts are all there.
pub(crate) struct Parts<'f> {
    kind: PatchKind,
    /// What errors call the patch: the beginning of its keys, or its target.
    name: String,
    tensors: BTreeMap<&'static str, Tensor<'f>>,
}

/// The name of a part that is not there.
pub(crate) struct MissingPart(pub(crate) &'static str);

impl<'f> Parts<'f> {
    /// The patch of `kind` with these `tensors` by part.
    pub(crate) fn new(
        kind: PatchKind,
        name: String,
        tensors: BTreeMap<&'static str, Tensor<'f>>,
    ) -> Result<Self, MissingPart> {
        match missing(kind, |part| tensors.contains_key(part)) {
            Some(part) => Err(MissingPart(part)),
            None => Ok(Self { kind, name, tensors }),
        }
    }

    /// The keys of the tensors.
    pub(crate) fn keys(&self) -> impl Iterator<Item = &'f str> {
        self.tensors.values().map(|tensor| tensor.key)
    }

    /// Checks types, shapes and limits before any tensor is read.
    pub(crate) fn check(&self, limits: &Limits) -> Result<(), AdapterError> {
        for (_, tensor) in self.tensors.iter().filter(|(part, _)| **part != ALPHA) {
            tensor.dtype()?;
        }
        let fit = self.fit()?;
        if fit.rank > limits.rank_max {
            let (key, limit) = (self.name.clone(), limits.rank_max);
            return Err(AdapterError::RankTooLarge { key, rank: fit.rank, limit });
        }
        if self.has(DORA_SCALE) {
            fit.check_dora(self.matrix_shape(DORA_SCALE)?).map_err(|error| self.fault(error))?;
        }
        Ok(())
    }

    /// Reads the tensors and makes the patch.
    pub(crate) fn read<S: ByteSource + ?Sized>(
        &self,
        file: &Container<'_, S>,
    ) -> Result<Patch, AdapterError> {
        let reader = Reader { parts: self, file };
        let patch = reader.patch()?;
        match reader.optional_matrix(DORA_SCALE)? {
            Some(scale) => patch.with_dora_scale(scale).map_err(|error| self.fault(error)),
            None => Ok(patch),
        }
    }

    /// What the shapes say, if they belong together.
    fn fit(&self) -> Result<Fit, AdapterError> {
        let matrix = |part| self.matrix_shape(part);
        let array = |part| self.tensor(part).array_shape();
        let rescale = || self.has("rescale").then(|| array("rescale")).transpose();
        let fit = match self.kind {
            PatchKind::Lora => {
                let mid = self.has(MID).then(|| matrix(MID)).transpose()?;
                let (up, down) = (matrix(UP)?, matrix(DOWN)?);
                let rank = check_shapes(up, down, mid)
                    .map_err(|source| AdapterError::LowRank { key: self.name.clone(), source })?;
                return Ok(Fit::new(rank, [up[0], down[1]]));
            }
            PatchKind::Loha => {
                let cores = if self.has("t1") { Some([array("t1")?, array("t2")?]) } else { None };
                let w1 = [matrix("w1_a")?, matrix("w1_b")?];
                let w2 = [matrix("w2_a")?, matrix("w2_b")?];
                fit_hadamard(w1, w2, cores)
            }
            PatchKind::Lokr => {
                let t2 = self.has("t2").then(|| array("t2")).transpose()?;
                fit_kronecker(self.factor_shape(W1)?, self.factor_shape(W2)?, t2)
            }
            PatchKind::Glora => {
                fit_glora([matrix("a1")?, matrix("a2")?, matrix("b1")?, matrix("b2")?])
            }
            PatchKind::Oft => fit_oft(array("blocks")?, rescale()?),
            PatchKind::Boft => fit_boft(array("blocks")?, rescale()?),
            PatchKind::Diff | PatchKind::Set | PatchKind::ModelAsLora => {
                array(VALUE)?;
                Ok(Fit::UNKNOWN)
            }
            PatchKind::Unchanged => {
                self.tensor(MARK).check_mark()?;
                Ok(Fit::UNKNOWN)
            }
        };
        fit.map_err(|error| self.fault(error))
    }

    fn has(&self, part: &str) -> bool {
        self.tensors.contains_key(part)
    }

    /// A part that is there: a needed one, or one that `has` found.
    fn tensor(&self, part: &str) -> Tensor<'f> {
        *self.tensors.get(part).expect("needed parts are there: checked when the value was made")
    }

    /// Rows and columns of a part that is a matrix.
    ///
    /// Trailing dimensions are dropped as far as `ComfyUI` flattens them.
    fn matrix_shape(&self, part: &str) -> Result<[usize; 2], AdapterError> {
        let tensor = self.tensor(part);
        match (self.kind, part) {
            (_, DORA_SCALE) => tensor.plain_matrix(),
            (PatchKind::Lora, _) => tensor.flattened(),
            (PatchKind::Glora, _) | (PatchKind::Lokr, "w2") => tensor.pointwise(),
            _ => tensor.plain_matrix(),
        }
    }

    fn factor_shape(&self, [full, a, b]: [&str; 3]) -> Result<FactorShape, AdapterError> {
        Ok(if self.has(full) {
            FactorShape::Full(self.matrix_shape(full)?)
        } else {
            FactorShape::LowRank([self.matrix_shape(a)?, self.matrix_shape(b)?])
        })
    }

    fn fault(&self, source: PatchError) -> AdapterError {
        AdapterError::Patch { key: self.name.clone(), source }
    }
}

/// Reads the tensors of one patch.
struct Reader<'r, 'f, 's, S: ?Sized> {
    parts: &'r Parts<'f>,
    file: &'r Container<'s, S>,
}

impl<S: ByteSource + ?Sized> Reader<'_, '_, '_, S> {
    /// The patch without its magnitudes.
    fn patch(&self) -> Result<Patch, AdapterError> {
        let alpha = self.alpha()?;
        let made = match self.parts.kind {
            PatchKind::Lora => {
                let (up, down) = (self.matrix(UP)?, self.matrix(DOWN)?);
                return LowRank::new(up, down, self.optional_matrix(MID)?, alpha)
                    .map(Patch::LowRank)
                    .map_err(|source| AdapterError::LowRank {
                        key: self.parts.name.clone(),
                        source,
                    });
            }
            PatchKind::Loha => {
                let w1 = [self.matrix("w1_a")?, self.matrix("w1_b")?];
                let w2 = [self.matrix("w2_a")?, self.matrix("w2_b")?];
                let cores = self.optional_array("t1")?.zip(self.optional_array("t2")?);
                Hadamard::new(w1, w2, cores.map(<[Array; 2]>::from), alpha).map(Patch::Hadamard)
            }
            PatchKind::Lokr => {
                let (w1, w2) = (self.factor(W1)?, self.factor(W2)?);
                Kronecker::new(w1, w2, self.optional_array("t2")?, alpha).map(Patch::Kronecker)
            }
            PatchKind::Glora => {
                let a = [self.matrix("a1")?, self.matrix("a2")?];
                let b = [self.matrix("b1")?, self.matrix("b2")?];
                Glora::new(a, b, alpha).map(Patch::Glora)
            }
            PatchKind::Oft => {
                let rescale = self.optional_array("rescale")?;
                Oft::new(self.array("blocks")?, rescale, alpha).map(Patch::Oft)
            }
            PatchKind::Boft => {
                let rescale = self.optional_array("rescale")?;
                Boft::new(self.array("blocks")?, rescale, alpha).map(Patch::Boft)
            }
            PatchKind::Diff => Ok(Patch::Diff(Diff::new(self.array(VALUE)?))),
            PatchKind::Set => Ok(Patch::Set(SetWeight::new(self.array(VALUE)?))),
            PatchKind::ModelAsLora => Ok(Patch::ModelAsLora(ModelAsLora::new(self.array(VALUE)?))),
            PatchKind::Unchanged => Ok(Patch::Unchanged),
        };
        made.map_err(|error| self.parts.fault(error))
    }

    fn alpha(&self) -> Result<Option<f64>, AdapterError> {
        self.parts.tensors.get(ALPHA).map(|alpha| alpha.read_alpha(self.file)).transpose()
    }

    fn matrix(&self, part: &str) -> Result<Matrix, AdapterError> {
        self.parts.tensor(part).read_matrix(self.file, self.parts.matrix_shape(part)?)
    }

    fn optional_matrix(&self, part: &str) -> Result<Option<Matrix>, AdapterError> {
        self.parts.has(part).then(|| self.matrix(part)).transpose()
    }

    fn array(&self, part: &str) -> Result<Array, AdapterError> {
        self.parts.tensor(part).read_array(self.file)
    }

    fn optional_array(&self, part: &str) -> Result<Option<Array>, AdapterError> {
        self.parts.has(part).then(|| self.array(part)).transpose()
    }

    fn factor(&self, [full, a, b]: [&str; 3]) -> Result<Factor, AdapterError> {
        Ok(if self.parts.has(full) {
            Factor::Full(self.matrix(full)?)
        } else {
            Factor::LowRank { a: self.matrix(a)?, b: self.matrix(b)? }
        })
    }
}

/// The three parts of each matrix of a Kronecker product: whole, or in two factors.
pub(crate) const W1: [&str; 3] = ["w1", "w1_a", "w1_b"];
/// As [`W1`].
pub(crate) const W2: [&str; 3] = ["w2", "w2_a", "w2_b"];

/// Every part that a patch of `kind` can have.
pub(crate) fn parts_of(kind: PatchKind) -> &'static [&'static str] {
    match kind {
        PatchKind::Lora => &[UP, DOWN, MID, ALPHA, DORA_SCALE],
        PatchKind::Loha => &["w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2", ALPHA, DORA_SCALE],
        PatchKind::Lokr => &["w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2", ALPHA, DORA_SCALE],
        PatchKind::Glora => &["a1", "a2", "b1", "b2", ALPHA, DORA_SCALE],
        PatchKind::Oft | PatchKind::Boft => &["blocks", "rescale", ALPHA, DORA_SCALE],
        PatchKind::Diff | PatchKind::Set | PatchKind::ModelAsLora => &[VALUE],
        PatchKind::Unchanged => &[MARK],
    }
}

/// The first needed part of a patch of `kind` that is not there.
pub(crate) fn missing(kind: PatchKind, has: impl Fn(&str) -> bool) -> Option<&'static str> {
    let first = |needed: &[&'static str]| needed.iter().copied().find(|part| !has(part));
    match kind {
        PatchKind::Lora => first(&[UP, DOWN]),
        PatchKind::Loha => first(&["w1_a", "w1_b", "w2_a", "w2_b"])
            .or_else(|| (has("t1") || has("t2")).then(|| first(&["t1", "t2"]))?),
        PatchKind::Lokr => [W1, W2].into_iter().find_map(|[full, a, b]| {
            if has(full) {
                None
            } else if has(a) || has(b) {
                first(&[a, b])
            } else {
                Some(full)
            }
        }),
        PatchKind::Glora => first(&["a1", "a2", "b1", "b2"]),
        PatchKind::Oft | PatchKind::Boft => first(&["blocks"]),
        PatchKind::Diff | PatchKind::Set | PatchKind::ModelAsLora => first(&[VALUE]),
        PatchKind::Unchanged => first(&[MARK]),
    }
}

/// Takes out what ComfyUI does not look at beside the other parts of a patch of `kind`.
pub(crate) fn drop_unused<T>(kind: PatchKind, parts: &mut BTreeMap<&'static str, T>) {
    let has = |part| parts.contains_key(part);
    let (is_loha, is_lokr) = (kind == PatchKind::Loha, kind == PatchKind::Lokr);
    // The second core counts beside the first one, and a whole matrix before its factors.
    let rules: [(bool, &[&str]); 3] = [
        (is_loha && !has("t1"), &["t2"]),
        (is_lokr && has("w1"), &["w1_a", "w1_b"]),
        (is_lokr && has("w2"), &["w2_a", "w2_b", "t2"]),
    ];
    for (_, unused) in rules.iter().filter(|(applies, _)| *applies) {
        parts.retain(|part, _| !unused.contains(part));
    }
}
