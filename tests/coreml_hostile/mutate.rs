//! Breaks packages, deterministically: mutant `n` of a package is the same on every machine.
//!
//! Half of the mutations are of bytes (bits flipped, files truncated, spans removed, doubled and overwritten, in any of
//! the three files; numbers of weight.bin's records replaced), half of the decoded program, so that they get past the
//! first checks: operations, bindings, types, shapes, immediate values and references to blobs replaced, swapped,
//! removed and doubled.

use palettist::coreml::format::proto::{
    self, BindingKind, DimensionKind, ImmediateKind, Operation, TensorElements, Value, ValueKind, ValueTypeKind,
};
use prost::Message;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// The three files of a package.
#[derive(Clone)]
pub struct Files {
    pub manifest: Vec<u8>,
    pub model: Vec<u8>,
    pub weights: Vec<u8>,
}

/// Numbers at which arithmetic goes wrong.
const EDGES: [u64; 20] = [
    0,
    1,
    2,
    3,
    63,
    64,
    127,
    128,
    255,
    65_535,
    65_536,
    (1 << 31) - 1,
    1 << 31,
    (1 << 32) - 1,
    1 << 32,
    1 << 40,
    (1 << 63) - 1,
    1 << 63,
    u64::MAX - 63,
    u64::MAX,
];

/// Mutant `number` of a package, of which `program` is the decoded model.
pub fn mutant(original: &Files, program: &proto::Model, number: u64) -> Files {
    let mut mutator = Mutator { random: ChaCha8Rng::seed_from_u64(number) };
    let mut files = original.clone();
    if mutator.below(2) == 0 {
        for _ in 0..1 + mutator.below(3) {
            mutator.bytes(&mut files);
        }
    } else {
        let mut model = program.clone();
        for _ in 0..1 + mutator.below(2) {
            mutator.program(&mut model, original.weights.len() as u64);
        }
        files.model = model.encode_to_vec();
    }
    files
}

struct Mutator {
    random: ChaCha8Rng,
}

impl Mutator {
    fn below(&mut self, limit: usize) -> usize {
        (self.random.random::<u64>() % limit.max(1) as u64) as usize
    }

    fn edge(&mut self) -> u64 {
        match self.below(4) {
            0 => self.random.random(),
            1 => self.random.random::<u64>() % 300,
            _ => EDGES[self.below(EDGES.len())],
        }
    }

    fn one<'a, T>(&mut self, of: &'a mut [T]) -> Option<&'a mut T> {
        let at = self.below(of.len());
        of.get_mut(at)
    }

    fn bytes(&mut self, files: &mut Files) {
        let file = match self.below(8) {
            0 => &mut files.manifest,
            1..=4 => &mut files.model,
            _ if self.below(2) == 0 => return self.record(&mut files.weights),
            _ => &mut files.weights,
        };
        if file.is_empty() {
            return;
        }
        let at = self.below(file.len());
        let length = (1 << self.below(8)).min(file.len() - at);
        match self.below(7) {
            0 | 1 => file[at] ^= 1 << self.below(8),
            2 => file[at] = self.edge() as u8,
            3 => file.truncate(at),
            4 => drop(file.drain(at..at + length)),
            5 => {
                let span = file[at..at + length].to_vec();
                let to = self.below(file.len());
                file.splice(to..to, span);
            }
            _ => {
                let number = self.edge().to_le_bytes();
                let length = length.min(8);
                file[at..at + length].copy_from_slice(&number[..length]);
            }
        }
    }

    /// A number of weight.bin's header or of one of its records.
    fn record(&mut self, weights: &mut [u8]) {
        let records: Vec<usize> = (64..weights.len().saturating_sub(64))
            .step_by(64)
            .filter(|&at| weights[at..at + 4] == [0xef, 0xbe, 0xad, 0xde])
            .collect();
        let (start, fields): (usize, &[(usize, usize)]) = match records.get(self.below(records.len() + 1)) {
            Some(&record) => (record, &[(0, 4), (4, 4), (8, 8), (16, 8), (24, 8), (32, 8)]),
            None => (0, &[(0, 4), (4, 4), (8, 8)]),
        };
        let (field, length) = fields[self.below(fields.len())];
        let number = match self.below(3) {
            0 => 64 * (self.edge() % 64),
            _ => self.edge(),
        };
        if let Some(place) = weights.get_mut(start + field..start + field + length) {
            place.copy_from_slice(&number.to_le_bytes()[..length]);
        }
    }

    fn program(&mut self, model: &mut proto::Model, weight_bytes: u64) {
        if self.below(12) == 0 {
            return self.frame(model);
        }
        let Some(function) = model.ml_program.as_mut().and_then(|program| program.functions.values_mut().next()) else {
            return;
        };
        let Some(block) = function.block_specializations.values_mut().next() else { return };
        let operations = &mut block.operations;
        let (at, other) = (self.below(operations.len()), self.below(operations.len()));
        let Some(from) = operations.get(other).cloned() else { return };
        match self.below(12) {
            0 => operations.swap(at, other),
            1 => drop(operations.remove(at)),
            2 => operations.insert(at, from),
            3 => operations[at].r#type = from.r#type,
            4 => operations[at].inputs = from.inputs,
            5 => {
                // Bound to another value, whatever that is.
                let Some(name) = from.outputs.first().map(|output| output.name.clone()) else { return };
                let which = self.below(operations[at].inputs.len());
                let Some(argument) = operations[at].inputs.values_mut().nth(which) else { return };
                if let Some(binding) = self.one(&mut argument.arguments) {
                    binding.binding = Some(BindingKind::Name(name));
                }
            }
            6 => operations[at].outputs = from.outputs,
            7 => {
                let key = operations[at].inputs.keys().nth(self.below(operations[at].inputs.len())).cloned();
                if let Some(key) = key {
                    operations[at].inputs.remove(&key);
                }
            }
            8 | 9 => {
                if let Some(output) = self.one(&mut operations[at].outputs) {
                    self.kind(&mut output.r#type);
                }
            }
            _ => self.value(&mut operations[at], weight_bytes),
        }
    }

    /// What stands around the operations.
    fn frame(&mut self, model: &mut proto::Model) {
        let edge = self.edge();
        let description = model.description.get_or_insert_default();
        match self.below(6) {
            0 => model.specification_version = edge as i32,
            1 => {
                if let Some(input) = self.one(&mut description.input) {
                    input.name.push('x');
                }
            }
            2 => description.output.clear(),
            3 => {
                if let Some(proto::FeatureKind::MultiArray(array)) = self
                    .one(&mut description.input)
                    .and_then(|input| input.r#type.as_mut())
                    .and_then(|kind| kind.kind.as_mut())
                    && let Some(size) = self.one(&mut array.shape)
                {
                    *size = edge as i64;
                }
            }
            4 => {
                let functions = model.ml_program.iter_mut().flat_map(|program| program.functions.values_mut());
                for function in functions {
                    if let Some(input) = self.one(&mut function.inputs) {
                        self.kind(&mut input.r#type);
                    }
                }
            }
            _ => {
                let functions = model.ml_program.iter_mut().flat_map(|program| program.functions.values_mut());
                for block in functions.flat_map(|function| function.block_specializations.values_mut()) {
                    let name = block.operations.get(edge as usize % block.operations.len().max(1));
                    let name = name.and_then(|operation| operation.outputs.first()).map(|output| output.name.clone());
                    block.outputs.extend(name);
                }
            }
        }
    }

    fn kind(&mut self, kind: &mut Option<proto::ValueType>) {
        let Some(ValueTypeKind::Tensor(tensor)) = kind.as_mut().and_then(|kind| kind.kind.as_mut()) else { return };
        let edge = self.edge();
        match self.below(4) {
            0 => tensor.data_type = [0, 1, 2, 10, 11, 12, 21, 23, 31, 34, 35, 36, 99][edge as usize % 13],
            1 => tensor.rank = edge as i64,
            2 => drop(tensor.dimensions.pop()),
            _ => {
                if let Some(dimension) = self.one(&mut tensor.dimensions) {
                    dimension.dimension = Some(DimensionKind::Constant(proto::ConstantDimension { size: edge }));
                }
            }
        }
    }

    /// A value that stands in the operation: a constant's, or a parameter of a palette's.
    fn value(&mut self, operation: &mut Operation, weight_bytes: u64) {
        let bindings = operation.inputs.values_mut().flat_map(|argument| &mut argument.arguments);
        let in_place = bindings.filter_map(|binding| match &mut binding.binding {
            Some(BindingKind::Value(value)) => Some(value),
            _ => None,
        });
        let mut values: Vec<&mut Value> = operation.attributes.values_mut().chain(in_place).collect();
        let Some(value) = self.one(&mut values) else { return };
        let edge = self.edge();
        if self.below(4) == 0 {
            return self.kind(&mut value.r#type);
        }
        match &mut value.kind {
            Some(ValueKind::BlobFile(place)) => match self.below(4) {
                0 => place.offset = edge,
                1 => place.offset = 64 * (edge % (weight_bytes / 64 + 1)),
                2 => place.offset = place.offset.wrapping_add(64),
                _ => place.file_name.push_str("/../x"),
            },
            Some(ValueKind::Immediate(immediate)) => {
                let Some(ImmediateKind::Tensor(tensor)) = &mut immediate.value else { return };
                match &mut tensor.value {
                    Some(TensorElements::Ints(ints)) => match self.one(&mut ints.values) {
                        Some(value) => *value = edge as i32,
                        None => ints.values.push(edge as i32),
                    },
                    Some(TensorElements::Floats(floats)) => {
                        let odd = [f32::NAN, f32::INFINITY, -1.0, 0.0, 1e30, f32::MIN_POSITIVE];
                        floats.values.push(odd[edge as usize % odd.len()]);
                    }
                    Some(TensorElements::Bools(bools)) => bools.values.push(edge.is_multiple_of(2)),
                    Some(TensorElements::Strings(strings)) => {
                        let odd = ["", "valid", "fp16", "int32", "bchk,bkhq->bchq", "abcd,abcd->abcd", "same", "\u{0}"];
                        strings.values = vec![odd[edge as usize % odd.len()].to_owned()];
                    }
                    Some(TensorElements::Bytes(bytes)) => match self.one(&mut bytes.values) {
                        Some(byte) => *byte = edge as u8,
                        None => bytes.values.extend(edge.to_le_bytes()),
                    },
                    _ => {}
                }
            }
            None => {}
        }
    }
}
