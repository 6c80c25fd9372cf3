//! Group norm, which MIL spells with many operations.

use std::io::{Seek, Write};

use anyhow::Result;
use half::f16;

use super::interpreter::MilOps;
use crate::coreml::format::proto::data_type::{FLOAT16, FLOAT32};
use crate::coreml::writing::program::{Parameter, Var};

impl<W: Write + Seek> MilOps<'_, W> {
    /// MIL has no group norm: the mean and the variance over `[C/groups, H, W]` of `[B, groups, C/groups, H, W]`.
    pub(super) fn normalize_groups(&mut self, x: &Var, name: &str, groups: i64, eps: f64) -> Var {
        let (channels, height, width) = (x.shape[1], x.shape[2], x.shape[3]);
        let part = |part: &str| format!("{name}_{part}");
        let grouped = self.reshape(&part("grouped"), x, vec![x.shape[0], groups, channels / groups, height, width]);
        let mean = self.over_group("reduce_mean", &part("mean"), &grouped);
        let centered = self.binary("sub", &part("centered"), &grouped, Parameter::Var(&mean));
        // In units in which squares do not overflow; ε is a square.
        let (centered, scaled_eps) = if self.large_values && self.element == FLOAT16 {
            let scale = self.scale_to_square(&centered, name);
            let scaled = self.binary("mul", &part("scaled"), &centered, Parameter::Var(&scale));
            let scale = self.unary("square", &part("scale_squared"), &scale);
            (scaled, Some(self.binary("mul", &part("eps"), &scale, self.number(eps))))
        } else {
            (centered, None)
        };
        let eps = scaled_eps.as_ref().map_or(self.number(eps), Parameter::Var);
        let squared = self.unary("square", &part("squared"), &centered);
        let variance = self.over_group("reduce_mean", &part("variance"), &squared);
        let variance = self.binary("add", &part("variance_eps"), &variance, eps);
        let deviation = self.unary("sqrt", &part("deviation"), &variance);
        let normalized = self.binary("real_div", &part("normalized"), &centered, Parameter::Var(&deviation));
        self.reshape(&part("ungrouped"), &normalized, x.shape.clone())
    }

    /// For each group of `x`, a factor with which fp16 holds its squares, up to 65504: 1, where the largest value is more
    /// than 128 a 16th, and where it is more than 2048 a 256th. Powers of two, so that nothing is rounded; by `clip`,
    /// which every device has, since comparisons take some out of fp16.
    fn scale_to_square(&mut self, x: &Var, name: &str) -> Var {
        let part = |part: &str| format!("{name}_{part}");
        let magnitude = self.unary("abs", &part("magnitude"), x);
        let largest = self.over_group("reduce_max", &part("largest"), &magnitude);
        // From 1 at `least` to 1/16 at the 128th more; fp16 holds all numbers on the way.
        let mut step = |least: f64, hint: &str| {
            let parameters = [
                ("x", Parameter::Var(&largest)),
                ("alpha", self.number(least)),
                ("beta", self.number(least * 129.0 / 128.0)),
            ];
            let shape = largest.shape.clone();
            let clipped =
                self.program.op("clip", &part(&format!("{hint}_clipped")), &parameters, largest.element, shape);
            let slope = self.number(-15.0 / 16.0 * 128.0 / least);
            let sloped = self.binary("mul", &part(&format!("{hint}_sloped")), &clipped, slope);
            self.binary("add", &part(hint), &sloped, self.number(121.0))
        };
        let (first, second) = (step(128.0, "scale_a"), step(2048.0, "scale_b"));
        self.binary("mul", &part("scale"), &first, Parameter::Var(&second))
    }

    /// A reduction of `[B, groups, C/groups, H, W]` to `[B, groups, 1, 1, 1]`.
    fn over_group(&mut self, kind: &str, name: &str, x: &Var) -> Var {
        let parameters =
            [("x", Parameter::Var(x)), ("axes", Parameter::Ints(&[2, 3, 4])), ("keep_dims", Parameter::Bool(true))];
        self.program.op(kind, name, &parameters, x.element, vec![x.shape[0], x.shape[1], 1, 1, 1])
    }

    /// `gamma · x + beta`, a number of each for every channel of `x` `[B, C, H, W]`.
    ///
    /// As Apple's converter has it: a batch norm of mean 0 and variance 1, which rounds once to fp16, where a product and
    /// a sum round twice. Its ε is the least that fp16 holds, and lost beside 1; Apple's, 1e-5, is an error of 106 dB.
    pub(super) fn scale_channels(&mut self, x: &Var, name: &str, gamma: &Var, beta: &Var) -> Result<Var> {
        const EPSILON: f64 = 1.0 / (1 << 24) as f64;
        let [zeros, ones] = self.zeros_and_ones(x.shape[1])?;
        let parameters = [
            ("x", Parameter::Var(x)),
            ("mean", Parameter::Var(&zeros)),
            ("variance", Parameter::Var(&ones)),
            ("gamma", Parameter::Var(gamma)),
            ("beta", Parameter::Var(beta)),
            ("epsilon", self.number(EPSILON)),
        ];
        Ok(self.program.op("batch_norm", name, &parameters, x.element, x.shape.clone()))
    }

    fn zeros_and_ones(&mut self, channels: i64) -> Result<[Var; 2]> {
        if let Some(both) = self.zeros_and_ones.get(&channels) {
            return Ok(both.clone());
        }
        let mut all = |hint: &str, value: f32| {
            let one = match self.element {
                FLOAT32 => value.to_le_bytes().to_vec(),
                _ => f16::from_f32(value).to_le_bytes().to_vec(),
            };
            let bytes = one.repeat(channels as usize);
            self.program.tensor(&format!("{hint}_{channels}"), self.element, &[channels], &bytes)
        };
        let both = [all("zeros", 0.0)?, all("ones", 1.0)?];
        self.zeros_and_ones.insert(channels, both.clone());
        Ok(both)
    }
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind, Tensor};

    use crate::coreml::DeploymentTarget;
    use crate::coreml::format::metadata::PackageMetadata;
    use crate::coreml::reading::{Chain, Precision, psnr};
    use crate::coreml::writing::interface::{Destination, Input, Interface, Output, Weighted, write};
    use crate::ops::{Ops, Weights};

    /// Libtorch's group norm in fp32 beside the package's in both arithmetics, at every size that fp16 has, well above the ε that it rounds.
    #[test]
    fn group_norm_holds_at_every_size_of_values() {
        tch::manual_seed(7);
        let shape = [1, 8, 16, 16];
        let half = |x: Tensor| x.to_kind(Kind::Half).to_kind(Kind::Float);
        let (gamma, beta) = (
            half(Tensor::randn([8], (Kind::Float, Device::Cpu))),
            half(Tensor::randn([8], (Kind::Float, Device::Cpu))),
        );
        let weights: Weights =
            [("norm.weight".to_owned(), gamma.shallow_clone()), ("norm.bias".to_owned(), beta.shallow_clone())].into();
        let folder = tempfile::tempdir().unwrap();
        let metadata = PackageMetadata { model: "norm".into(), ..Default::default() };
        let interface = Interface {
            component: "norm".into(),
            about: "A group norm.".into(),
            inputs: vec![Input::half("x", "", &shape)],
            outputs: vec![Output::new("y", "")],
        };
        let path = write(
            Destination {
                folder: folder.path(),
                target: DeploymentTarget::Ios16,
                overwrite: false,
                metadata: &metadata,
            },
            &interface,
            Weighted { weights: &weights, parameters: 2, progress: &mut |_, _| () },
            |ops, inputs| {
                ops.expect_large_values();
                vec![ops.group_norm(&inputs[0], "norm", 4, 1e-6)]
            },
        )
        .unwrap();
        let package = Chain::open(&path).unwrap();
        let noise = Tensor::randn(shape, (Kind::Float, Device::Cpu));
        // Some groups large, others not; and all equal.
        let uneven = Tensor::from_slice(&[0.1f32, 0.1, 1.0, 1.0, 400.0, 400.0, 9000.0, 9000.0]).view([1, 8, 1, 1]);
        let mut cases: Vec<Tensor> =
            [0.03, 0.1, 1.0, 30.0, 60.0, 300.0, 900.0, 5000.0, 15000.0].map(|scale| &noise * scale).into();
        cases.extend([&noise * uneven, Tensor::ones(shape, (Kind::Float, Device::Cpu)) * 512.0]);
        for x in cases.into_iter().map(half) {
            // In 64 bits: in 32, libtorch's variance of equal values is not zero.
            let [x64, gamma, beta] = [&x, &gamma, &beta].map(|x| x.to_kind(Kind::Double));
            let expected = x64.group_norm(4, Some(&gamma), Some(&beta), 1e-6, false).to_kind(Kind::Float);
            let of = |precision| {
                let inputs = [("x".to_owned(), x.shallow_clone())].into();
                let outputs = package.evaluate(&inputs, precision, &mut |_, _| Ok(())).unwrap();
                psnr(&expected, &outputs["y"])
            };
            let (single, half) = (of(Precision::Float32), of(Precision::Float16));
            let largest = x.abs().max().double_value(&[]);
            assert!(single > 90.0 && half > 60.0, "values up to {largest}: {single} dB, {half} dB");
        }
    }
}
