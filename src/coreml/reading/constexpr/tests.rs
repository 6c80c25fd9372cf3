//! Compressed constants worked out by hand, each in a program of its own.

use std::collections::BTreeMap;

use anyhow::Result;

use super::Constants;
use crate::coreml::format::proto::{self, *};
use crate::coreml::reading::constant::{Array, Blobs, Elements};
use crate::coreml::reading::program;

/// An immediate value stored as bytes.
fn bytes(data_type: i32, shape: &[u64], values: &[u8]) -> proto::Value {
    let size = |&size| Dimension { dimension: Some(DimensionKind::Constant(ConstantDimension { size })) };
    let tensor = proto::TensorType {
        data_type,
        rank: shape.len() as i64,
        dimensions: shape.iter().map(size).collect(),
        attributes: BTreeMap::new(),
    };
    let elements = match data_type {
        data_type::STRING => TensorElements::Strings(RepeatedStrings { values: vec!["name".into()] }),
        data_type::INT32 => TensorElements::Ints(RepeatedInts { values: values.iter().map(|&v| v.into()).collect() }),
        _ => TensorElements::Bytes(RepeatedBytes { values: values.to_vec() }),
    };
    let tensor_value = TensorValue { value: Some(elements) };
    proto::Value {
        doc_string: "".into(),
        r#type: Some(ValueType { kind: Some(ValueTypeKind::Tensor(tensor)) }),
        kind: Some(ValueKind::Immediate(ImmediateValue { value: Some(ImmediateKind::Tensor(tensor_value)) })),
    }
}

/// Infers and decodes one compressed constant in a package of `package_bytes`.
fn decode(version: i32, package_bytes: u64, kind: &str, given: Vec<(&str, proto::Value)>) -> Result<Array> {
    let result = bytes(data_type::FLOAT16, &[1], &[0, 0]).r#type;
    let mut operation = proto::Operation {
        r#type: kind.into(),
        outputs: vec![NamedValueType { name: "w".into(), r#type: result }],
        attributes: BTreeMap::from([("name".to_string(), bytes(data_type::STRING, &[], &[]))]),
        ..Default::default()
    };
    for (name, value) in given {
        if version < 9 {
            operation.attributes.insert(name.into(), value);
        } else {
            let binding = Binding { binding: Some(BindingKind::Value(value)) };
            operation.inputs.insert(name.into(), Argument { arguments: vec![binding] });
        }
    }
    let opset = if version < 9 { "CoreML6" } else { "CoreML8" };
    let block = Block { operations: vec![operation], ..Default::default() };
    let block_specializations = BTreeMap::from([(opset.to_string(), block)]);
    let function = Function { opset: opset.into(), block_specializations, ..Default::default() };
    let functions = BTreeMap::from([("main".to_string(), function)]);
    let program = proto::Program { version: 1, functions, ..Default::default() };
    let blobs = Blobs::new();
    let program = program::Program::from_proto(program, version, &blobs)?;
    let constants = Constants::new(&program, &blobs, version, package_bytes);
    constants.infer(&program.operations[0])?;
    constants.array("w")
}

fn halves(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|&v| half::f16::from_f32(v).to_le_bytes()).collect()
}

#[test]
fn scales_and_masks() {
    use data_type::{FLOAT16, INT8, INT32, UINT1, UINT4, UINT8, UINT32};
    // scale · (q − zero), a scale for each row
    let affine = |axis| {
        vec![
            ("quantized_data", bytes(INT8, &[2, 2], &[1, 2, 3, 0xff])),
            ("zero_point", bytes(INT8, &[], &[1])),
            ("scale", bytes(FLOAT16, &[2], &halves(&[0.5, 2.0]))),
            ("axis", bytes(INT32, &[], &[axis])),
        ]
    };
    let got = decode(7, 1 << 20, "constexpr_affine_dequantize", affine(0)).unwrap();
    assert_eq!(got.elements, Elements::Floats(vec![0.0, 0.5, 4.0, -4.0]));
    let got = decode(7, 1 << 20, "constexpr_affine_dequantize", affine(1)).unwrap();
    assert_eq!(got.elements, Elements::Floats(vec![0.0, 2.0, 1.0, -4.0]));
    assert!(decode(7, 1 << 20, "constexpr_affine_dequantize", affine(2)).is_err());
    assert!(decode(9, 1 << 20, "constexpr_affine_dequantize", affine(0)).is_err(), "a form of iOS 16 and 17");

    let blockwise = vec![
        ("data", bytes(UINT4, &[2, 2], &[0x21, 0xf3])),
        ("scale", bytes(FLOAT16, &[1, 2], &halves(&[1.0, 0.5]))),
        ("offset", bytes(UINT4, &[1, 2], &[0x01])),
    ];
    let got = decode(9, 1 << 20, "constexpr_blockwise_shift_scale", blockwise).unwrap();
    assert_eq!(got.elements, Elements::Floats(vec![0.0, 1.0, 2.0, 7.5]));

    let sparse = |mask: u8| {
        vec![
            ("nonzero_data", bytes(FLOAT16, &[2], &halves(&[3.0, 4.0]))),
            ("mask", bytes(UINT8, &[1], &[mask])),
            ("shape", bytes(UINT32, &[1], &[5, 0, 0, 0])),
        ]
    };
    let got = decode(7, 1 << 20, "constexpr_sparse_to_dense", sparse(0b1_0010)).unwrap();
    assert_eq!(got.elements, Elements::Floats(vec![0.0, 3.0, 0.0, 0.0, 4.0]));
    assert!(decode(7, 1 << 20, "constexpr_sparse_to_dense", sparse(0b1)).is_err(), "one bit for two values");
    let mask = vec![("nonzero_data", bytes(FLOAT16, &[1], &halves(&[3.0]))), ("mask", bytes(UINT1, &[2, 1], &[0b10]))];
    let got = decode(9, 1 << 20, "constexpr_sparse_to_dense", mask).unwrap();
    assert_eq!(got.elements, Elements::Floats(vec![0.0, 3.0]));
}

#[test]
fn small_files_do_not_become_large_tensors() {
    use data_type::{FLOAT16, INT32, UINT1};
    // 1 bit an index, vectors of 1024: a kilobyte of indices would stand for 8 million weights.
    let bomb = || {
        vec![
            ("indices", bytes(UINT1, &[8192, 1], &[0; 1024])),
            ("lut", bytes(FLOAT16, &[1, 1, 2, 1024], &[0; 4096])),
            ("vector_axis", bytes(INT32, &[], &[0])),
        ]
    };
    let message = format!("{:#}", decode(9, 5 << 10, "constexpr_lut_to_dense", bomb()).unwrap_err());
    assert!(message.contains("larger than its package can stand for"), "{message}");
    assert!(decode(9, 5 << 20, "constexpr_lut_to_dense", bomb()).is_ok());
}
