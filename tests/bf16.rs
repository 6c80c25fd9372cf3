//! Master weights in bf16: palettes see them, and give gradients back, exactly as those of the same values in f32, rounded
//! once.

use palettist::palette::{DkmLayer, Form, LutDtype};
use tch::{Device, Kind, Tensor};

const FLOAT: (Kind, Device) = (Kind::Float, Device::Cpu);

/// Numbers of every form, and vectors.
fn forms() -> Vec<Form> {
    let plain = Form::per_tensor(2);
    let grouped = Form { group_size: Some(4), bits: 4, ..plain };
    vec![
        plain,
        grouped,
        Form { axis: 1, ..grouped },
        Form { per_channel_scale: true, ..plain },
        Form { lut_dtype: LutDtype::I8, per_channel_scale: true, ..grouped },
        Form { cluster_dim: 2, bits: 4, ..plain },
        Form { cluster_dim: 4, bits: 6, axis: 1, ..plain },
    ]
}

/// ŵ, ∂L/∂w and the weight with its assignments fixed.
fn all(layer: &DkmLayer, weight: &Tensor, upstream: &Tensor) -> [Tensor; 3] {
    let mut layer = layer.clone();
    let mut soft = weight.empty_like();
    let state = layer.soften(weight, 0.5, 3, None, &mut soft).unwrap();
    let mut gradient = upstream.copy();
    state.backward(&mut gradient).unwrap();
    let mut hard = weight.empty_like();
    layer.freeze(weight).unwrap().dense(&mut hard).unwrap();
    [soft, gradient, hard]
}

#[test]
fn every_form_computes_as_in_f32_and_rounds_once() {
    tch::manual_seed(12);
    // Ends that no vector of 16 fills, and one large enough for several pieces and for stores past the caches.
    let shapes: [&[i64]; 3] = [&[8, 12, 3, 3], &[12, 20], &[1004, 900]];
    for (shape, form) in shapes.into_iter().flat_map(|shape| forms().into_iter().map(move |form| (shape, form))) {
        if shape[0] > 1000 && form.cluster_dim > 1 {
            continue; // Slow, and no different.
        }
        let weight = (Tensor::randn(shape, FLOAT) * 0.05).to_kind(Kind::BFloat16);
        let upstream = Tensor::randn(shape, FLOAT).to_kind(Kind::BFloat16);
        let layer = DkmLayer::new("layer", form, &weight).unwrap();
        assert_eq!(layer, DkmLayer::new("layer", form, &weight.to_kind(Kind::Float)).unwrap());
        let ours = all(&layer, &weight, &upstream);
        let wide = all(&layer, &weight.to_kind(Kind::Float), &upstream.to_kind(Kind::Float));
        for ((ours, wide), what) in ours.iter().zip(&wide).zip(["soft weight", "gradient", "hard weight"]) {
            assert_eq!(ours.kind(), Kind::BFloat16);
            assert!(ours.equal(&wide.to_kind(Kind::BFloat16)), "{form:?} {shape:?}: {what}");
        }
        assert!(ours[1].abs().max().double_value(&[]) > 0.0);
    }
}

#[test]
fn types_that_do_not_fit_are_refused() {
    let weight = Tensor::ones([64, 4], FLOAT).to_kind(Kind::BFloat16);
    let mut layer = DkmLayer::new("some.weight", Form::per_tensor(2), &weight).unwrap();
    let mut soft = Tensor::zeros([64, 4], FLOAT);
    let told = format!("{:#}", layer.soften(&weight, 0.5, 3, None, &mut soft).err().unwrap());
    assert!(told.contains("some.weight") && told.contains("does not fit"), "{told}");
    let half = weight.to_kind(Kind::Half);
    let mut soft = half.empty_like();
    let told = format!("{:#}", layer.soften(&half, 0.5, 3, None, &mut soft).err().unwrap());
    assert!(told.contains("Float or BFloat16, not Half"), "{told}");
    // A weight that is no number is refused as in f32.
    let bad = Tensor::full([64, 4], f64::NAN, FLOAT).to_kind(Kind::BFloat16);
    let mut soft = bad.empty_like();
    let told = format!("{:#}", layer.soften(&bad, 0.5, 3, None, &mut soft).err().unwrap());
    assert!(told.contains("256 of its values are infinite"), "{told}");
}
