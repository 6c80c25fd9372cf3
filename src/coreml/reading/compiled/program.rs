//! `model.mil`: the text of a program, parsed into the messages that a package has.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail, ensure};

use super::elements::elements;
use super::number::integer;
use super::words::{Word, Words, shown};
use crate::coreml::format::proto::{
    Argument, Binding, BindingKind, BlobFileValue, Block, ConstantDimension, DictionaryType, DictionaryValue,
    Dimension, DimensionKind, Function, ImmediateKind, ImmediateValue, KeyValuePair, NamedValueType, Operation,
    Program, TensorElements, TensorType, UnknownDimension, Value, ValueKind, ValueType, ValueTypeKind, data_type,
};

/// How deep types and values may lie in one another.
const DEEPEST: usize = 16;

/// How many dimensions a type may have.
const MOST_DIMENSIONS: usize = 16;

/// The version that a text says it is of, `1.0`, and its program.
///
/// # Errors
/// Names the line.
pub fn parse(text: &str) -> Result<(String, Program)> {
    let mut words = Words::of(text).context("line 1")?;
    let parsed = program(&mut words);
    parsed.with_context(|| format!("line {}", words.line()))
}

fn program(words: &mut Words) -> Result<(String, Program)> {
    words.keyword("program")?;
    words.expect('(')?;
    let Word::Number(version) = words.take()? else { bail!("a version is expected") };
    words.expect(')')?;
    let attributes = attributes(words)?;
    words.expect('{')?;
    let mut functions = BTreeMap::new();
    while words.peek() == Word::Name("func") {
        let (name, function) = function(words)?;
        ensure!(functions.insert(name.clone(), function).is_none(), "a second function {name:.80}");
    }
    words.expect('}')?;
    ensure!(words.peek() == Word::End, "the end of the file is expected, there is {}", shown(words.peek()));
    Ok((version.to_owned(), Program { version: 1, functions, doc_string: String::new(), attributes }))
}

fn function(words: &mut Words) -> Result<(String, Function)> {
    words.keyword("func")?;
    let name = words.name()?.to_owned();
    words.expect('<')?;
    let set = words.name()?;
    words.expect('>')?;
    let number = set.strip_prefix("ios").and_then(|number| number.parse::<u32>().ok());
    let number = number.filter(|number| (15..=25).contains(number));
    let opset = number.with_context(|| format!("`{set:.40}` is not a known set of operations"))?;
    let opset = format!("CoreML{}", opset - 10);
    words.expect('(')?;
    let mut inputs = Vec::new();
    while words.peek() != Word::Sign(')') {
        if !inputs.is_empty() {
            words.expect(',')?;
        }
        inputs.push(named(words)?);
    }
    words.expect(')')?;
    ensure!(words.peek() != Word::Sign('['), "the function has attributes; flexible shapes are not read");
    words.expect('{')?;
    let mut operations = Vec::new();
    while words.peek() != Word::Sign('}') {
        operations.push(operation(words)?);
    }
    words.expect('}')?;
    ensure!(words.take()? == Word::Arrow, "`->` is expected");
    words.expect('(')?;
    let mut outputs = Vec::new();
    while words.peek() != Word::Sign(')') {
        if !outputs.is_empty() {
            words.expect(',')?;
        }
        outputs.push(words.name()?.to_owned());
    }
    words.expect(')')?;
    words.expect(';')?;
    let block = Block { outputs, operations, ..Block::default() };
    let block_specializations = BTreeMap::from([(opset.clone(), block)]);
    Ok((name, Function { inputs, opset, block_specializations, attributes: BTreeMap::new() }))
}

/// A type and a name.
fn named(words: &mut Words) -> Result<NamedValueType> {
    let kind = value_type(words, 0)?;
    Ok(NamedValueType { r#type: Some(kind), name: words.name()?.to_owned() })
}

fn operation(words: &mut Words) -> Result<Operation> {
    let mut outputs = vec![named(words)?];
    while words.skip(',')? {
        outputs.push(named(words)?);
    }
    words.expect('=')?;
    let kind = words.name()?.to_owned();
    words.expect('(')?;
    let mut inputs = BTreeMap::new();
    while words.peek() != Word::Sign(')') {
        if !inputs.is_empty() {
            words.expect(',')?;
        }
        let name = words.name()?.to_owned();
        words.expect('=')?;
        let argument = argument(words)?;
        ensure!(inputs.insert(name.clone(), argument).is_none(), "a second argument {name:.80}");
    }
    words.expect(')')?;
    let attributes = attributes(words)?;
    words.expect(';')?;
    Ok(Operation { r#type: kind, inputs, outputs, blocks: Vec::new(), attributes })
}

/// `[name = value, …]`, where there is one.
fn attributes(words: &mut Words) -> Result<BTreeMap<String, Value>> {
    let mut attributes = BTreeMap::new();
    if !words.skip('[')? {
        return Ok(attributes);
    }
    loop {
        let name = words.name()?.to_owned();
        words.expect('=')?;
        let value = value(words)?;
        ensure!(attributes.insert(name.clone(), value).is_none(), "a second attribute {name:.80}");
        if words.skip(']')? {
            return Ok(attributes);
        }
        words.expect(',')?;
    }
}

fn argument(words: &mut Words) -> Result<Argument> {
    let mut arguments = Vec::new();
    if !words.skip('(')? {
        return Ok(Argument { arguments: vec![binding(words)?] });
    }
    loop {
        arguments.push(binding(words)?);
        if words.skip(')')? {
            return Ok(Argument { arguments });
        }
        words.expect(',')?;
    }
}

fn binding(words: &mut Words) -> Result<Binding> {
    let is_value = matches!(words.peek_second()?, Word::Sign('<' | '('));
    let kind = if is_value { BindingKind::Value(value(words)?) } else { BindingKind::Name(words.name()?.to_owned()) };
    Ok(Binding { binding: Some(kind) })
}

fn value_type(words: &mut Words, depth: usize) -> Result<ValueType> {
    ensure!(depth < DEEPEST, "types lie in one another more than {DEEPEST} deep");
    let word = words.name()?;
    let kind = match word {
        "tensor" => {
            words.expect('<')?;
            let data_type = element_type(words.name()?)?;
            words.expect(',')?;
            let dimensions = dimensions(words)?;
            words.expect('>')?;
            let rank = dimensions.len() as i64;
            ValueTypeKind::Tensor(TensorType { data_type, rank, dimensions, attributes: BTreeMap::new() })
        }
        "dict" => {
            words.expect('<')?;
            let key = value_type(words, depth + 1)?;
            words.expect(',')?;
            let value = value_type(words, depth + 1)?;
            words.expect('>')?;
            ValueTypeKind::Dictionary(Box::new(DictionaryType {
                key_type: Some(Box::new(key)),
                value_type: Some(Box::new(value)),
            }))
        }
        "list" | "tuple" | "state" => bail!("values of the type {word} are not read"),
        scalar => ValueTypeKind::Tensor(TensorType { data_type: element_type(scalar)?, ..TensorType::default() }),
    };
    Ok(ValueType { kind: Some(kind) })
}

fn dimensions(words: &mut Words) -> Result<Vec<Dimension>> {
    words.expect('[')?;
    let mut dimensions = Vec::new();
    while words.peek() != Word::Sign(']') {
        if !dimensions.is_empty() {
            words.expect(',')?;
        }
        let dimension = match words.take()? {
            Word::Sign('?') => DimensionKind::Unknown(UnknownDimension { variadic: false }),
            Word::Number(size) => {
                let size = u64::try_from(integer(size)?).ok().context("a size is not a valid number")?;
                DimensionKind::Constant(ConstantDimension { size })
            }
            other => bail!("a size is expected, there is {}", shown(other)),
        };
        dimensions.push(Dimension { dimension: Some(dimension) });
        ensure!(dimensions.len() <= MOST_DIMENSIONS, "a type has more than {MOST_DIMENSIONS} dimensions");
    }
    words.expect(']')?;
    Ok(dimensions)
}

fn element_type(name: &str) -> Result<i32> {
    Ok(match name {
        "bool" => data_type::BOOL,
        "string" => data_type::STRING,
        "fp16" => data_type::FLOAT16,
        "fp32" => data_type::FLOAT32,
        "fp64" => data_type::FLOAT64,
        "bf16" => data_type::BFLOAT16,
        "int4" => data_type::INT4,
        "int8" => data_type::INT8,
        "int16" => data_type::INT16,
        "int32" => data_type::INT32,
        "int64" => data_type::INT64,
        "uint1" => data_type::UINT1,
        "uint2" => data_type::UINT2,
        "uint3" => data_type::UINT3,
        "uint4" => data_type::UINT4,
        "uint6" => data_type::UINT6,
        "uint8" => data_type::UINT8,
        "uint16" => data_type::UINT16,
        "uint32" => data_type::UINT32,
        "uint64" => data_type::UINT64,
        _ => bail!("`{name:.40}` is not a known type"),
    })
}

/// A type and, in brackets, what has it.
fn value(words: &mut Words) -> Result<Value> {
    let kind = value_type(words, 0)?;
    words.expect('(')?;
    let content = content(words, &kind, 0)?;
    words.expect(')')?;
    Ok(Value { doc_string: String::new(), r#type: Some(kind), kind: Some(content) })
}

fn content(words: &mut Words, kind: &ValueType, depth: usize) -> Result<ValueKind> {
    ensure!(depth < DEEPEST, "values lie in one another more than {DEEPEST} deep");
    let immediate = match &kind.kind {
        Some(ValueTypeKind::Tensor(_)) if words.peek() == Word::Name("BLOBFILE") => {
            return blob_file(words).map(ValueKind::BlobFile);
        }
        Some(ValueTypeKind::Tensor(tensor)) => ImmediateKind::Tensor(elements(words, tensor)?),
        Some(ValueTypeKind::Dictionary(dictionary)) => {
            let (key, value) = (dictionary.key_type.as_deref(), dictionary.value_type.as_deref());
            let (key, value) = (key.context("no type")?, value.context("no type")?);
            ImmediateKind::Dictionary(pairs(words, key, value, depth)?)
        }
        _ => bail!("a value of this type is not read"),
    };
    Ok(ValueKind::Immediate(ImmediateValue { value: Some(immediate) }))
}

/// `{{key, value}, …}`
fn pairs(words: &mut Words, key: &ValueType, value: &ValueType, depth: usize) -> Result<DictionaryValue> {
    let part = |words: &mut Words, kind: &ValueType| -> Result<Option<Value>> {
        let content = content(words, kind, depth + 1)?;
        Ok(Some(Value { doc_string: String::new(), r#type: Some(kind.clone()), kind: Some(content) }))
    };
    let mut values = Vec::new();
    words.expect('{')?;
    while words.peek() != Word::Sign('}') {
        if !values.is_empty() {
            words.expect(',')?;
        }
        words.expect('{')?;
        let key = part(words, key)?;
        words.expect(',')?;
        let value = part(words, value)?;
        words.expect('}')?;
        values.push(KeyValuePair { key, value });
    }
    words.expect('}')?;
    Ok(DictionaryValue { values })
}

/// `BLOBFILE(path = string("…"), offset = uint64(64))`
fn blob_file(words: &mut Words) -> Result<BlobFileValue> {
    words.keyword("BLOBFILE")?;
    words.expect('(')?;
    words.keyword("path")?;
    words.expect('=')?;
    let path = value(words)?;
    words.expect(',')?;
    words.keyword("offset")?;
    words.expect('=')?;
    let offset = value(words)?;
    words.expect(')')?;
    let scalar = |value: &Value| match &value.kind {
        Some(ValueKind::Immediate(ImmediateValue { value: Some(ImmediateKind::Tensor(tensor)) })) => {
            tensor.value.clone()
        }
        _ => None,
    };
    match (scalar(&path), scalar(&offset)) {
        (Some(TensorElements::Strings(mut path)), Some(TensorElements::LongInts(offset)))
            if path.values.len() == 1 && offset.values.len() == 1 =>
        {
            // An unsigned number stands in the signed field by its bits.
            Ok(BlobFileValue { file_name: path.values.remove(0), offset: offset.values[0] as u64 })
        }
        _ => bail!("a BLOBFILE has a path, a text, and an offset, a number of the type uint64"),
    }
}
