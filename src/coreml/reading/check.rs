//! The rules of a program: every name defined once and before its use, every input known, present, constant where it
//! must be, every declared type the one that follows from the inputs.

use std::collections::{BTreeMap, HashMap, HashSet};

use anyhow::{Context, Result, bail, ensure};

use super::call::{Call, Operand};
use super::constant::{Array, Blobs, Constant};
use super::constexpr::{Constants, LONGEST_CHAIN, Source};
use super::program::{Argument, Operation, Program};
use super::types::{DataType, TensorType};
use super::{ops, signature};

/// Most elements of a parameter: a vector of axes or sizes.
const PARAMETER_ELEMENTS: u64 = 4096;

const RESERVED: [&str; 24] = [
    "any", "bool", "program", "func", "tensor", "list", "dict", "tuple", "true", "false", "string", "bf16", "fp16",
    "fp32", "fp64", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "state",
];

/// What checking found out, for the evaluator.
#[derive(Debug, Default)]
pub struct Checked {
    /// Type of every value.
    pub kinds: HashMap<String, TensorType>,
    /// Parameters by the name of their constant.
    pub literals: HashMap<String, Array>,
    /// Parameters written in place, by number of the operation and name of the input.
    pub in_place: HashMap<(usize, String), Array>,
    /// The most that integers can be that are computed from shapes, by name; none of them is negative.
    pub most: HashMap<String, i64>,
}

/// Checks a whole program.
///
/// # Errors
/// On the first operation that breaks a rule.
pub fn check(program: &Program, blobs: &Blobs, specification_version: i32, constants: &Constants) -> Result<Checked> {
    let mut checker = Checker {
        specification_version,
        blobs,
        constants,
        checked: Checked::default(),
        constant: HashMap::new(),
        computed: HashSet::new(),
        used: HashSet::new(),
    };
    for input in &program.inputs {
        identifier(&input.name).context("input of the function")?;
        let known = checker.checked.kinds.insert(input.name.clone(), input.kind.clone());
        ensure!(known.is_none(), "input {} is declared twice", input.name);
    }
    let mut names = HashSet::new();
    for operation in &program.operations {
        checker
            .operation(operation)
            .and_then(|()| {
                ensure!(names.insert(&operation.name), "the operation name {} is used twice", operation.name);
                identifier(&operation.name)
            })
            .with_context(|| operation.place())?;
    }
    ensure!(!program.outputs.is_empty(), "the program has no outputs");
    let mut outputs = HashSet::new();
    for output in &program.outputs {
        ensure!(outputs.insert(output), "output {} is listed twice", output.escape_debug());
        ensure!(
            checker.computed.contains(output.as_str()),
            "output {} must be computed by an operation, it is an input, a constant or nothing",
            output.escape_debug()
        );
    }
    if let Some(input) = program.inputs.iter().find(|input| !checker.used.contains(input.name.as_str())) {
        bail!("input {} is never used", input.name);
    }
    Ok(checker.checked)
}

struct Checker<'a> {
    specification_version: i32,
    blobs: &'a Blobs,
    constants: &'a Constants<'a>,
    checked: Checked,
    /// Constants by name, with the length of the chain of compressed constants behind each.
    constant: HashMap<&'a str, usize>,
    /// Values made by operations that are not constants.
    computed: HashSet<&'a str>,
    used: HashSet<&'a str>,
}

impl<'a> Checker<'a> {
    fn operation(&mut self, operation: &'a Operation) -> Result<()> {
        let inferred = if operation.is_const() {
            let value = operation.attributes.get("val").context("a const needs the attribute val")?;
            ensure!(
                operation.inputs.is_empty() && operation.attributes.len() == 1,
                "a const has no inputs and no attributes but name and val"
            );
            vec![value.kind.clone()]
        } else if operation.is_constexpr() {
            for source in self.constants.parameters(operation)?.into_values() {
                if let Source::Named(name) = source {
                    let chain = self.constant.get(name).copied();
                    let chain = chain.with_context(|| format!("{} is not an earlier constant", name.escape_debug()))?;
                    ensure!(chain < LONGEST_CHAIN, "a chain of more than {LONGEST_CHAIN} compressed constants");
                }
            }
            vec![self.constants.infer(operation)?]
        } else {
            self.inputs(operation)?;
            let call = call(operation, self.specification_version, &self.checked)?;
            let (inferred, most) = (ops::infer(&call)?, ops::most(&call));
            drop(call);
            if let (Some(most), Some(output)) = (most, operation.outputs.first()) {
                self.checked.most.insert(output.name.clone(), most);
            }
            inferred
        };
        self.define(operation, &inferred)
    }

    /// Checks the inputs against the operation's signature and decodes its parameters.
    fn inputs(&mut self, operation: &'a Operation) -> Result<()> {
        if let Some(attribute) = operation.attributes.keys().next() {
            bail!("unknown attribute {}", attribute.escape_debug());
        }
        let Some(signature) = signature::inputs(&operation.kind) else {
            bail!("this operation is not known to the reader");
        };
        for input in signature {
            if input.since > self.specification_version {
                ensure!(
                    !operation.inputs.contains_key(input.name),
                    "input {} needs specification version {}",
                    input.name,
                    input.since
                );
                ensure!(!input.operand, "it needs specification version {}", input.since);
            } else {
                ensure!(
                    input.optional || operation.inputs.contains_key(input.name),
                    "input {} must be written out",
                    input.name
                );
            }
        }
        for (name, bound) in &operation.inputs {
            let input = signature.iter().find(|input| input.name == name);
            let Some(input) = input else { bail!("unknown input {}", name.escape_debug()) };
            ensure!(input.list || bound.len() == 1, "input {name} is bound to {} values", bound.len());
            for argument in bound {
                match argument {
                    Argument::Name(value) => {
                        let known = self.checked.kinds.contains_key(value);
                        ensure!(known, "input {name} is {}, which is not defined before", value.escape_debug());
                        self.used.insert(value);
                        let constant = self.constant.contains_key(value.as_str());
                        ensure!(
                            constant || self.specification_version >= input.constant_before,
                            "input {name} must be constant, {value} is computed"
                        );
                        let computed = input.computed && !constant;
                        if !input.operand && !computed && !self.checked.literals.contains_key(value) {
                            let literal = self.literal(value).with_context(|| format!("parameter {name}"))?;
                            self.checked.literals.insert(value.clone(), literal);
                        }
                    }
                    Argument::Value(constant) => {
                        ensure!(constant.blob().is_none(), "input {name} is a blob in place");
                        if !input.operand {
                            let literal = self.decode(constant).with_context(|| format!("parameter {name}"))?;
                            self.checked.in_place.insert((operation.number, name.clone()), literal);
                        }
                    }
                }
            }
        }
        Ok(())
    }

    fn literal(&self, value: &str) -> Result<Array> {
        match self.constants.producer(value).and_then(|producer| producer.attributes.get("val")) {
            Some(constant) => self.decode(constant),
            None => bail!("{value} is not a plain constant; computed parameters are not supported"),
        }
    }

    fn decode(&self, constant: &Constant) -> Result<Array> {
        ensure!(constant.kind.elements() <= PARAMETER_ELEMENTS, "a parameter of {}", constant.kind);
        constant.decode(self.blobs)
    }

    /// Compares what an operation declares with what was inferred.
    fn define(&mut self, operation: &'a Operation, inferred: &[TensorType]) -> Result<()> {
        let constant = operation.is_const() || operation.is_constexpr();
        ensure!(
            operation.outputs.len() == inferred.len(),
            "it declares {} outputs, it has {}",
            operation.outputs.len(),
            inferred.len()
        );
        for (output, inferred) in operation.outputs.iter().zip(inferred) {
            identifier(&output.name)?;
            ensure!(
                output.kind.declares(inferred),
                "output {} is declared {}, it follows {inferred}",
                output.name,
                output.kind
            );
            ensure!(
                constant || inferred.rank() <= 5,
                "output {} has rank {}, more than 5",
                output.name,
                inferred.rank()
            );
            use DataType::*;
            let flows = match inferred.data_type {
                Float16 | Float32 | Int32 | Bool | String => true,
                Int8 | Uint8 | Int16 | Uint16 => self.specification_version >= 8,
                _ => false,
            };
            ensure!(constant || flows, "values of {} cannot be computed", inferred.data_type);
            let known = self.checked.kinds.insert(output.name.clone(), inferred.clone());
            ensure!(known.is_none(), "{} is defined twice", output.name);
            if constant {
                self.constant.insert(&output.name, self.chain(operation));
            } else {
                self.computed.insert(&output.name);
            }
        }
        Ok(())
    }

    /// Compressed constants behind this one, itself included.
    fn chain(&self, operation: &'a Operation) -> usize {
        let sources = operation.inputs.values().flatten();
        let behind = sources.filter_map(|argument| match argument {
            Argument::Name(name) => self.constant.get(name.as_str()).copied(),
            Argument::Value(_) => None,
        });
        usize::from(operation.is_constexpr()) + behind.max().unwrap_or(0)
    }
}

/// An operation whose inputs have been checked, with their types and literals; without tensors.
pub fn call<'a>(operation: &'a Operation, specification_version: i32, checked: &'a Checked) -> Result<Call<'a>> {
    let operand = |name: &'a String, argument: &'a Argument| -> Result<Operand<'a>> {
        Ok(match argument {
            Argument::Name(value) => Operand {
                kind: checked.kinds.get(value).with_context(|| format!("{value} is not defined"))?,
                literal: checked.literals.get(value),
                most: checked.most.get(value).copied(),
                tensor: None,
            },
            Argument::Value(constant) => Operand {
                kind: &constant.kind,
                literal: checked.in_place.get(&(operation.number, name.clone())),
                most: None,
                tensor: None,
            },
        })
    };
    let inputs = operation
        .inputs
        .iter()
        .map(|(name, bound)| {
            let operands = bound.iter().map(|argument| operand(name, argument)).collect::<Result<_>>()?;
            Ok((name.as_str(), operands))
        })
        .collect::<Result<BTreeMap<_, _>>>()?;
    Ok(Call { kind: &operation.kind, specification_version, inputs })
}

/// MIL's identifiers: a letter or `_`, then letters, digits, `_` and `@`; not a word of its text form.
fn identifier(name: &str) -> Result<()> {
    let letter = |c: u8| c.is_ascii_alphabetic() || c == b'_';
    let well_formed =
        name.bytes().next().is_some_and(letter) && name.bytes().all(|c| letter(c) || c.is_ascii_digit() || c == b'@');
    ensure!(well_formed, "{name:?} is not an identifier");
    ensure!(!RESERVED.contains(&name), "{name:?} is a reserved word");
    Ok(())
}
