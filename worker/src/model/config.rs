//! Sizes of one text encoder.

use super::parameter::{LayerModule, Module, Parameter, Role};

/// Everything about a text encoder that is not a weight.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TextConfig {
    /// Width of a hidden state.
    pub hidden: usize,
    /// Transformer layers.
    pub layers: usize,
    /// Width between the two linear layers of an MLP.
    pub intermediate: usize,
    /// Attention heads; divides `hidden`.
    pub heads: usize,
    /// Between the two linear layers of an MLP.
    pub activation: Activation,
    /// Rows of the token embedding.
    pub vocab: usize,
    /// Rows of the position embedding, which are the positions of every row of tokens: 77, or more
    /// for a LongCLIP.
    pub positions: usize,
    /// Width of the projected pooled output, when the encoder has a projection.
    pub projection: Option<usize>,
}

/// The activation function of an MLP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// `x · sigmoid(1.702 x)`: OpenAI's CLIP.
    QuickGelu,
    /// The exact Gaussian error linear unit, by `erf`: OpenCLIP.
    Gelu,
}

impl TextConfig {
    /// The shape of `parameter`, or nothing when this encoder has no such parameter.
    pub fn shape(&self, parameter: Parameter) -> Option<Vec<usize>> {
        let Parameter { module, role } = parameter;
        let (outputs, inputs) = match module {
            Module::TokenEmbedding => (self.vocab, self.hidden),
            Module::PositionEmbedding => (self.positions, self.hidden),
            Module::Projection => (self.projection?, self.hidden),
            Module::FinalNorm => return Some(vec![self.hidden]),
            Module::Layer(index, _) if index >= self.layers => return None,
            Module::Layer(_, LayerModule::Norm1 | LayerModule::Norm2) => {
                return Some(vec![self.hidden]);
            }
            Module::Layer(_, LayerModule::Fc1) => (self.intermediate, self.hidden),
            Module::Layer(_, LayerModule::Fc2) => (self.hidden, self.intermediate),
            Module::Layer(..) => (self.hidden, self.hidden),
        };
        match role {
            Role::Weight => Some(vec![outputs, inputs]),
            Role::Bias if module.has_bias() => Some(vec![outputs]),
            Role::Bias => None,
        }
    }

    /// Every parameter of this encoder, sorted by name.
    pub fn parameters(&self) -> Vec<Parameter> {
        let layers = (0..self.layers)
            .flat_map(|index| LayerModule::ALL.map(|module| Module::Layer(index, module)));
        let ends = [Module::TokenEmbedding, Module::PositionEmbedding, Module::FinalNorm];
        let mut parameters: Vec<Parameter> = ends
            .into_iter()
            .chain(layers)
            .chain([Module::Projection])
            .flat_map(|module| [Role::Weight, Role::Bias].map(|role| Parameter { module, role }))
            .filter(|parameter| self.shape(*parameter).is_some())
            .collect();
        parameters.sort_by_cached_key(Parameter::to_string);
        parameters
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clip_l_has_its_published_number_of_parameters() {
        let config = TextConfig {
            hidden: 768,
            layers: 12,
            intermediate: 3072,
            heads: 12,
            activation: Activation::QuickGelu,
            vocab: 49408,
            positions: 77,
            projection: Some(768),
        };

        let count = |config: &TextConfig| -> usize {
            let shapes = config.parameters().into_iter().map(|p| config.shape(p).unwrap());
            shapes.map(|shape| shape.iter().product::<usize>()).sum()
        };

        assert_eq!(count(&config), 123_650_304);
        let without = TextConfig { projection: None, ..config };
        assert_eq!(count(&without), 123_650_304 - 768 * 768);
    }
}
