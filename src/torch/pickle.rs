//! A restricted reader of Python pickles: it builds data and never runs or imports anything.
//!
//! Numbers, strings, tuples, lists, dictionaries and PyTorch's tensors come out as they are; any
//! other object becomes [`Value::Object`], a class's name and a state that nobody interprets. All
//! values live in one arena and refer to each other by index, so that neither deep nesting nor a
//! cycle can overflow the stack. Memory is bounded by the pickle's length.
//! Opcodes: CPython `Lib/pickle.py`.

use crate::array::MAX_DIMS;
use std::ops::Range;

/// A value's place in the arena.
pub type Id = u32;

/// A Python value.
#[derive(Clone, Debug)]
pub enum Value {
    /// `None`.
    None,
    /// `True` or `False`.
    Bool,
    /// An integer of at most 64 bits.
    Int(i64),
    /// A string.
    Str(String),
    /// A tuple, list or set.
    Sequence(Vec<Id>),
    /// Keys and values in order; a repeated key counts once more.
    Dict(Vec<(Id, Id)>),
    /// A class or function, `module.name`.
    Global(String),
    /// The argument of `persistent_load`: PyTorch's storages, and old PyTorch's classes.
    Persistent(Id),
    /// A tensor.
    Tensor(Box<TensorRef>),
    /// An object that we don't build: its class, and the state that BUILD gave it.
    Object {
        /// A [`Value::Global`], or whatever stood in its place.
        class: Id,
        /// Usually a dictionary of attributes.
        state: Option<Id>,
    },
    /// Data of a kind that we have no use for.
    Other(&'static str),
}

/// A tensor: a view into a storage.
#[derive(Clone, Debug)]
pub struct TensorRef {
    /// The storage, a [`Value::Persistent`].
    pub storage: Id,
    /// First element, from the storage's first.
    pub offset: usize,
    /// Length of each dimension.
    pub shape: Vec<usize>,
    /// Elements from one index to the next, for each dimension.
    pub strides: Vec<usize>,
}

/// A finished pickle.
pub struct Pickle {
    heap: Vec<Value>,
    /// The value that was pickled.
    pub root: Id,
    /// Bytes read, up to and with STOP.
    pub len: usize,
}

impl Pickle {
    /// The value of an index that came from this pickle.
    pub fn get(&self, id: Id) -> &Value {
        &self.heap[id as usize]
    }

    /// The value at an index of the arena, if there is one.
    pub fn try_get(&self, id: Id) -> Option<&Value> {
        self.heap.get(id as usize)
    }

    /// A string's text.
    pub fn str(&self, id: Id) -> Option<&str> {
        match self.get(id) {
            Value::Str(text) => Some(text),
            _ => None,
        }
    }

    /// A sequence's items.
    pub fn sequence(&self, id: Id) -> Option<&[Id]> {
        match self.get(id) {
            Value::Sequence(items) => Some(items),
            _ => None,
        }
    }

    /// An integer that fits.
    pub fn usize(&self, id: Id) -> Option<usize> {
        as_usize(self.get(id))
    }

    /// A dictionary's items.
    pub fn dict(&self, id: Id) -> Option<&[(Id, Id)]> {
        match self.get(id) {
            Value::Dict(pairs) => Some(pairs),
            _ => None,
        }
    }

    /// The last value under a key of a dictionary, or an attribute of an object.
    pub fn field(&self, id: Id, key: &str) -> Option<Id> {
        let pairs = match self.get(id) {
            Value::Object { state, .. } => self.dict((*state)?)?,
            _ => self.dict(id)?,
        };
        pairs.iter().rev().find(|&&(k, _)| self.str(k) == Some(key)).map(|&(_, value)| value)
    }

    /// The class of an object, `module.name`, or the name of a global.
    pub fn class(&self, id: Id) -> Option<&str> {
        let class = match self.get(id) {
            Value::Object { class, .. } => *class,
            _ => id,
        };
        match self.get(class) {
            Value::Global(name) => Some(name),
            // torch before 1.6: ('module', class, file, source)
            Value::Persistent(key) => match self.get(*self.sequence(*key)?.get(1)?) {
                Value::Global(name) => Some(name),
                _ => None,
            },
            _ => None,
        }
    }
}

fn as_usize(value: &Value) -> Option<usize> {
    match value {
        Value::Int(number) => usize::try_from(*number).ok(),
        _ => None,
    }
}

/// Bytes of memory that a pickle of `len` bytes may take.
///
/// A value takes 32 bytes and at least one byte of the file; two million of them are twenty times
/// what a checkpoint of 12 flows with its optimiser has.
fn memory_limit(len: usize) -> usize {
    (1 << 20) + len.saturating_mul(48).min(64 << 20)
}

/// Reads the first pickle of `bytes`.
///
/// # Errors
/// If it is damaged, or would need more memory than its length justifies.
pub fn read(bytes: &[u8]) -> Result<Pickle, String> {
    let mut machine = Machine {
        bytes,
        at: 0,
        heap: Vec::new(),
        stack: Vec::new(),
        marks: Vec::new(),
        memo: Vec::new(),
        left: memory_limit(bytes.len()),
    };
    let root = machine.run().map_err(|problem| format!("pickle: {problem} at byte {}", machine.at))?;
    Ok(Pickle { root, len: machine.at, heap: machine.heap })
}

struct Machine<'a> {
    bytes: &'a [u8],
    at: usize,
    heap: Vec<Value>,
    stack: Vec<Id>,
    /// Heights of the stack where MARK was seen.
    marks: Vec<usize>,
    memo: Vec<Option<Id>>,
    /// Bytes of memory that may still be taken.
    left: usize,
}

/// Text of an error.
type Problem = &'static str;

impl<'a> Machine<'a> {
    fn run(&mut self) -> Result<Id, Problem> {
        loop {
            match self.take(1)?[0] {
                b'.' => return self.pop(),
                0x80 => drop(self.take(1)?),
                0x95 => drop(self.take(8)?),
                b'(' => self.marks.push(self.stack.len()),
                b'0' => self.pop_or_mark()?,
                b'1' => drop(self.popped_mark()?),
                b'2' => {
                    let top = *self.stack.last().ok_or("stack is empty")?;
                    self.stack.push(top);
                }
                opcode => self.step(opcode)?,
            }
        }
    }

    fn step(&mut self, opcode: u8) -> Result<(), Problem> {
        match opcode {
            b'N' => self.push(Value::None),
            0x88 => self.push(Value::Bool),
            0x89 => self.push(Value::Bool),
            b'J' => {
                let number = i32::from_le_bytes(self.array()?);
                self.push(Value::Int(number.into()))
            }
            b'K' => {
                let number = self.take(1)?[0];
                self.push(Value::Int(number.into()))
            }
            b'M' => {
                let number = u16::from_le_bytes(self.array()?);
                self.push(Value::Int(number.into()))
            }
            b'I' | b'L' => self.text_number(),
            0x8a => self.long(1),
            0x8b => self.long(4),
            b'F' => self.line().and_then(|_| self.push(Value::Other("a number"))),
            b'G' => self.take(8).and_then(|_| self.push(Value::Other("a number"))),
            b'X' => self.string(4, true),
            0x8c => self.string(1, true),
            0x8d => self.string(8, true),
            b'T' => self.string(4, true),
            b'U' => self.string(1, true),
            b'B' => self.string(4, false),
            b'C' => self.string(1, false),
            0x8e | 0x96 => self.string(8, false),
            b'S' => {
                let line = self.line()?.trim_matches(['\'', '"']).to_owned();
                self.push(Value::Str(line))
            }
            b'V' => {
                let line = self.line()?.to_owned();
                self.push(Value::Str(line))
            }
            b']' | b')' | 0x8f => self.push(Value::Sequence(Vec::new())),
            b'}' => self.push(Value::Dict(Vec::new())),
            b't' | b'l' | 0x91 => {
                let items = self.popped_mark()?;
                self.push(Value::Sequence(items))
            }
            b'd' => {
                let items = self.popped_mark()?;
                let pairs = pairs(&items)?;
                self.push(Value::Dict(pairs))
            }
            0x85..=0x87 => {
                let from = self.height(usize::from(opcode - 0x84))?;
                let items = self.stack.split_off(from);
                self.push(Value::Sequence(items))
            }
            b'a' => {
                let item = self.pop()?;
                self.append(vec![item])
            }
            b'e' | 0x90 => {
                let items = self.popped_mark()?;
                self.append(items)
            }
            b's' => {
                let (value, key) = (self.pop()?, self.pop()?);
                self.set_items(vec![(key, value)])
            }
            b'u' => {
                let items = self.popped_mark()?;
                let pairs = pairs(&items)?;
                self.set_items(pairs)
            }
            b'q' | b'r' | b'p' | 0x94 => self.memoize(opcode),
            b'h' | b'j' | b'g' => self.recall(opcode),
            b'c' => {
                let name = format!("{}.{}", self.line()?, self.line()?);
                self.push(Value::Global(name))
            }
            0x93 => {
                let (name, module) = (self.pop()?, self.pop()?);
                let (Value::Str(module), Value::Str(name)) = (self.value(module), self.value(name)) else {
                    return Err("global without a name");
                };
                if module.len() + name.len() > 1024 {
                    return Err("global with an endless name");
                }
                let name = format!("{module}.{name}");
                self.push(Value::Global(name))
            }
            b'P' => {
                let key = self.line()?.to_owned();
                self.push(Value::Str(key))?;
                self.persistent()
            }
            b'Q' => self.persistent(),
            b'R' | 0x81 => {
                let (arguments, callable) = (self.pop()?, self.pop()?);
                self.call(callable, arguments)
            }
            0x92 => {
                let (_keywords, arguments, callable) = (self.pop()?, self.pop()?, self.pop()?);
                self.call(callable, arguments)
            }
            b'i' => {
                let name = format!("{}.{}", self.line()?, self.line()?);
                self.popped_mark()?;
                self.push(Value::Global(name))?;
                let class = self.pop()?;
                self.push(Value::Object { class, state: None })
            }
            b'o' => {
                let items = self.popped_mark()?;
                let class = *items.first().ok_or("object without a class")?;
                self.push(Value::Object { class, state: None })
            }
            b'b' => self.build(),
            _ => Err("unknown opcode"),
        }
    }

    fn take(&mut self, len: usize) -> Result<&'a [u8], Problem> {
        let end = self.at.checked_add(len).filter(|&end| end <= self.bytes.len()).ok_or("truncated")?;
        let taken = &self.bytes[self.at..end];
        self.at = end;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Problem> {
        self.take(N)?.try_into().map_err(|_| "truncated")
    }

    fn line(&mut self) -> Result<&'a str, Problem> {
        let rest = &self.bytes[self.at..];
        let len = rest.iter().take(4096).position(|&b| b == b'\n').ok_or("truncated or endless line")?;
        self.at += len + 1;
        std::str::from_utf8(&rest[..len]).map_err(|_| "line is not text")
    }

    /// Counts memory before it is taken.
    fn charge(&mut self, bytes: usize) -> Result<(), Problem> {
        self.left = self.left.checked_sub(bytes).ok_or("needs more memory than a file of its size should")?;
        Ok(())
    }

    fn push(&mut self, value: Value) -> Result<(), Problem> {
        let content = match &value {
            Value::Str(text) | Value::Global(text) => text.len(),
            Value::Sequence(items) => size_of_val(items.as_slice()),
            Value::Dict(pairs) => size_of_val(pairs.as_slice()),
            Value::Tensor(tensor) => size_of::<TensorRef>() + 2 * size_of_val(tensor.shape.as_slice()),
            _ => 0,
        };
        self.charge(size_of::<Value>() + content)?;
        let id = Id::try_from(self.heap.len()).map_err(|_| "too many values")?;
        self.heap.push(value);
        self.stack.push(id);
        Ok(())
    }

    fn value(&self, id: Id) -> &Value {
        &self.heap[id as usize]
    }

    fn pop(&mut self) -> Result<Id, Problem> {
        self.height(1)?;
        self.stack.pop().ok_or("stack is empty")
    }

    fn pop_or_mark(&mut self) -> Result<(), Problem> {
        if self.marks.last() == Some(&self.stack.len()) {
            self.marks.pop();
            return Ok(());
        }
        self.pop().map(drop)
    }

    /// The stack's height without its `count` top values, which must lie above the last mark.
    fn height(&self, count: usize) -> Result<usize, Problem> {
        let floor = self.marks.last().copied().unwrap_or(0);
        self.stack.len().checked_sub(count).filter(|&h| h >= floor).ok_or("stack is empty")
    }

    fn popped_mark(&mut self) -> Result<Vec<Id>, Problem> {
        let from = self.marks.pop().ok_or("no mark")?;
        Ok(self.stack.split_off(from))
    }

    fn length(&mut self, width: usize) -> Result<usize, Problem> {
        let mut word = [0; 8];
        word[..width].copy_from_slice(self.take(width)?);
        usize::try_from(u64::from_le_bytes(word)).map_err(|_| "truncated")
    }

    fn string(&mut self, width: usize, keep: bool) -> Result<(), Problem> {
        let len = self.length(width)?;
        let bytes = self.take(len)?;
        // Old strings need not be UTF-8; bytes hold nothing that we use.
        self.push(if keep { Value::Str(String::from_utf8_lossy(bytes).into_owned()) } else { Value::Other("bytes") })
    }

    fn long(&mut self, width: usize) -> Result<(), Problem> {
        let len = self.length(width)?;
        let bytes = self.take(len)?;
        if len > 8 {
            return self.push(Value::Other("a number"));
        }
        let negative = bytes.last().is_some_and(|b| b & 0x80 != 0);
        let mut word = [if negative { 0xff } else { 0 }; 8];
        word[..len].copy_from_slice(bytes);
        self.push(Value::Int(i64::from_le_bytes(word)))
    }

    fn text_number(&mut self) -> Result<(), Problem> {
        let value = match self.line()? {
            "00" | "01" => Value::Bool,
            line => Value::Int(line.trim_end_matches('L').parse().map_err(|_| "bad number")?),
        };
        self.push(value)
    }

    fn memo_key(&mut self, range: Range<u8>, opcode: u8) -> Result<usize, Problem> {
        match opcode {
            o if o == range.start => Ok(usize::from(self.take(1)?[0])),
            o if o == range.end => self.length(4),
            _ => self.line()?.parse().map_err(|_| "bad number"),
        }
    }

    fn memoize(&mut self, opcode: u8) -> Result<(), Problem> {
        let key = if opcode == 0x94 { self.memo.len() } else { self.memo_key(b'q'..b'r', opcode)? };
        // Writers number from 0 upwards; a wild key must not size the table.
        if key > self.bytes.len() {
            return Err("memo key is out of range");
        }
        if key >= self.memo.len() {
            self.charge((key + 1 - self.memo.len()) * size_of::<Option<Id>>())?;
            self.memo.resize(key + 1, None);
        }
        self.memo[key] = Some(*self.stack.last().ok_or("stack is empty")?);
        Ok(())
    }

    fn recall(&mut self, opcode: u8) -> Result<(), Problem> {
        let key = self.memo_key(b'h'..b'j', opcode)?;
        let id = self.memo.get(key).copied().flatten().ok_or("memo key is unknown")?;
        self.stack.push(id);
        Ok(())
    }

    fn persistent(&mut self) -> Result<(), Problem> {
        let key = self.pop()?;
        self.push(Value::Persistent(key))
    }

    fn append(&mut self, items: Vec<Id>) -> Result<(), Problem> {
        self.charge(size_of_val(items.as_slice()))?;
        let target = *self.stack.last().ok_or("stack is empty")?;
        if let Value::Sequence(list) = &mut self.heap[target as usize] {
            list.extend(items);
        }
        Ok(())
    }

    fn set_items(&mut self, items: Vec<(Id, Id)>) -> Result<(), Problem> {
        self.charge(size_of_val(items.as_slice()))?;
        let target = *self.stack.last().ok_or("stack is empty")?;
        if let Value::Dict(dict) = &mut self.heap[target as usize] {
            dict.extend(items);
        }
        Ok(())
    }

    /// Gives an object its state; a dictionary's extra attributes are dropped.
    fn build(&mut self) -> Result<(), Problem> {
        let given = self.pop()?;
        let target = *self.stack.last().ok_or("stack is empty")?;
        if let Value::Object { state, .. } = &mut self.heap[target as usize] {
            *state = Some(given);
        }
        Ok(())
    }

    /// What a call of a known function gives; anything else is an object that is never made.
    fn call(&mut self, callable: Id, arguments: Id) -> Result<(), Problem> {
        let arguments = match self.value(arguments) {
            Value::Sequence(items) => items.as_slice(),
            _ => &[],
        };
        let Value::Global(name) = self.value(callable) else {
            return self.push(Value::Object { class: callable, state: None });
        };
        let value = match (name.as_str(), arguments) {
            (
                "torch._utils._rebuild_tensor_v2" | "torch._utils._rebuild_tensor",
                &[storage, offset, shape, strides, ..],
            ) => self.tensor(storage, offset, shape, strides)?,
            (
                "torch._utils._rebuild_parameter" | "torch._utils._rebuild_parameter_with_state" | "torch.Size",
                &[inner, ..],
            ) => {
                self.stack.push(inner);
                return Ok(());
            }
            ("collections.OrderedDict" | "collections.defaultdict" | "builtins.dict" | "__builtin__.dict", items) => {
                let list = items.first().copied();
                return self.ordered_dict(list);
            }
            // how protocols 0 and 1 make objects
            ("copy_reg._reconstructor" | "copyreg._reconstructor", &[class, ..]) => {
                Value::Object { class, state: None }
            }
            _ => Value::Object { class: callable, state: None },
        };
        self.push(value)
    }

    /// A dictionary from a list of pairs, as Python 2 pickled an `OrderedDict`, or an empty one.
    fn ordered_dict(&mut self, list: Option<Id>) -> Result<(), Problem> {
        let items = match list.map(|list| self.value(list)) {
            Some(Value::Sequence(items)) => items.clone(),
            _ => Vec::new(),
        };
        // the list may be long, and given again and again
        self.charge(size_of_val(items.as_slice()))?;
        let pair = |&item: &Id| match self.value(item) {
            Value::Sequence(pair) => <[Id; 2]>::try_from(pair.as_slice()).ok().map(|[k, v]| (k, v)),
            _ => None,
        };
        let pairs = items.iter().map(pair).collect::<Option<Vec<_>>>().unwrap_or_default();
        self.push(Value::Dict(pairs))
    }

    fn tensor(&self, storage: Id, offset: Id, shape: Id, strides: Id) -> Result<Value, Problem> {
        let numbers = |id: Id| match self.value(id) {
            Value::Sequence(items) if items.len() <= MAX_DIMS => {
                items.iter().map(|&item| as_usize(self.value(item))).collect::<Option<Vec<_>>>()
            }
            _ => None,
        };
        let Value::Persistent(_) = self.value(storage) else {
            return Err("tensor without a storage");
        };
        let offset = as_usize(self.value(offset)).ok_or("tensor with a bad offset")?;
        let shape = numbers(shape).ok_or("tensor with a bad shape")?;
        let strides = numbers(strides).filter(|s| s.len() == shape.len()).ok_or("tensor with bad strides")?;
        Ok(Value::Tensor(Box::new(TensorRef { storage, offset, shape, strides })))
    }
}

fn pairs(items: &[Id]) -> Result<Vec<(Id, Id)>, Problem> {
    if items.len() % 2 == 1 {
        return Err("key without a value");
    }
    Ok(items.chunks_exact(2).map(|pair| (pair[0], pair[1])).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn protocol_2_and_4_data() {
        // pickle.dumps({"a": (1, -2, None), "b": [True, 3.5]}, 2)
        let two = b"\x80\x02}q\x00(X\x01\x00\x00\x00aq\x01K\x01J\xfe\xff\xff\xffN\x87q\x02X\x01\x00\x00\x00bq\x03]q\x04(\x88G@\x0c\x00\x00\x00\x00\x00\x00eu.";
        let pickle = read(two).unwrap();
        assert_eq!(pickle.len, two.len());
        let Value::Dict(pairs) = pickle.get(pickle.root) else { panic!() };
        assert_eq!(pickle.str(pairs[0].0), Some("a"));
        let tuple = pickle.sequence(pairs[0].1).unwrap();
        assert_eq!(pickle.usize(tuple[0]), Some(1));
        assert!(matches!(pickle.get(tuple[1]), Value::Int(-2)) && matches!(pickle.get(tuple[2]), Value::None));
        // pickle.dumps(("x", 300), 4)
        let four = b"\x80\x04\x95\x0a\x00\x00\x00\x00\x00\x00\x00\x8c\x01x\x94M\x2c\x01\x86\x94.";
        let pickle = read(four).unwrap();
        assert_eq!(pickle.usize(pickle.sequence(pickle.root).unwrap()[1]), Some(300));
    }

    #[test]
    fn a_call_is_never_made() {
        let pickle = read(b"cos\nsystem\n(S'rm -rf /'\ntR.").unwrap();
        assert!(matches!(pickle.get(pickle.root), Value::Object { state: None, .. }));
        assert_eq!(pickle.class(pickle.root), Some("os.system"));
    }

    /// `torch.save` of a module before PyTorch 1.6: its class comes as a persistent tuple with its source.
    #[test]
    fn objects_keep_their_class_and_state() {
        let old = b"(X\x06\x00\x00\x00modulecglow\nWaveGlow\nX\x07\x00\x00\x00glow.pyX\x09\x00\x00\x00import ostQ)\x81}X\x01\x00\x00\x00aK\x07sb.";
        let pickle = read(old).unwrap();
        assert_eq!(pickle.class(pickle.root), Some("glow.WaveGlow"));
        assert_eq!(pickle.field(pickle.root, "a").and_then(|id| pickle.usize(id)), Some(7));
        let plain = b"ccopy_reg\n_reconstructor\n(cglow\nWN\nc__builtin__\nobject\nNtR}b.";
        let pickle = read(plain).unwrap();
        assert_eq!(pickle.class(pickle.root), Some("glow.WN"));
        assert_eq!(pickle.field(pickle.root, "a"), None);
    }

    /// A short pickle can ask for much: a copied list again and again, or endless values.
    #[test]
    fn bombs_are_refused_before_they_take_memory() {
        let mut copies = b"ccollections\nOrderedDict\nq\x00(".to_vec();
        copies.extend(b"NN\x86".repeat(10_000));
        copies.extend(b"lq\x01");
        copies.extend(b"h\x00h\x01\x85R".repeat(10_000));
        copies.push(b'.');
        let mut values = vec![b'N'; 20_000_000];
        values.push(b'.');
        for bomb in [copies, values] {
            let problem = read(&bomb).err().unwrap();
            assert!(problem.starts_with("pickle: needs more memory than a file of its size should"), "{problem}");
        }
    }

    #[test]
    fn deep_nesting_and_cycles_are_harmless() {
        let mut deep = vec![b')'];
        deep.resize(1_000_000, 0x85);
        deep.push(b'.');
        assert!(read(&deep).is_ok());
        // l = []; l.append(l)
        assert!(read(b"]q\x00h\x00a.").is_ok());
    }

    #[test]
    fn damage_is_an_error() {
        for bytes in
            [&b"X\xff\xff\xff\x7f"[..], b".", b"u.", b"(K\x01u.", b"h\x05.", b"r\xff\xff\xff\xff.", b"\xfe", b"", b"R."]
        {
            assert!(read(bytes).is_err(), "{bytes:?}");
        }
    }
}
