/* loraport_check: replay a bundle's golden cases with ONNX Runtime's C API only.
 *
 *   cc -std=c11 -O2 -I path/to/onnxruntime/include loraport_check.c -ldl -lm -o loraport_check
 *   ./loraport_check BUNDLE --ort path/to/libonnxruntime.so
 *
 * One file for POSIX systems (Linux, Android, macOS): a small JSON reader, SHA-256, .safetensors,
 * the manifest, adapters and blends, and the replay. Whatever is wrong with a bundle ends the
 * program with one message and exit code 2; outputs that differ with 1. */
#define _POSIX_C_SOURCE 200809L
#include <dlfcn.h>
#include <errno.h>
#include <math.h>
#include <onnxruntime_c_api.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

enum { DONE = 0, MISMATCH = 1, REFUSED = 2, MAX_RANK = 8, MAX_DEPTH = 64 };
#define LARGEST_FILE ((uint64_t)4 << 30) /* of what is read whole: adapters, golden cases */

/* ---- Errors and memory --------------------------------------------------------------------- */

static _Noreturn void refuse(const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  fflush(stdout);
  fputs("loraport_check: error: ", stderr);
  vfprintf(stderr, format, arguments);
  fputc('\n', stderr);
  va_end(arguments);
  exit(REFUSED);
}

/* Everything lives until the program ends: a check is short, and so stays its code. */
typedef struct Block {
  struct Block *next;
  max_align_t memory[];
} Block;
static Block *blocks;

static void *take(uint64_t size) {
  Block *block = size < SIZE_MAX / 2 ? calloc(1, sizeof *block + (size_t)size + 1) : NULL;
  if (block == NULL) refuse("memory: expected %llu bytes, got none", (unsigned long long)size);
  block->next = blocks;
  blocks = block;
  return block->memory;
}

static void free_everything(void) {
  while (blocks != NULL) {
    Block *next = blocks->next;
    free(blocks);
    blocks = next;
  }
}

static char *join(const char *left, const char *right) {
  char *text = take(strlen(left) + strlen(right));
  strcat(strcpy(text, left), right);
  return text;
}

/* ---- JSON, refusing keys that occur twice and deep nesting ---------------------------------- */

typedef enum { NUL, BOOLEAN, NUMBER, STRING, ARRAY, OBJECT } Kind;
typedef struct Json {
  Kind kind;
  double number;
  char *string;
  char *key;           /* where this is a member of an object */
  struct Json *first;  /* of an array's items or an object's members */
  struct Json *next;
  uint64_t length;
} Json;
typedef struct {
  const char *at, *end, *name;
} Text;

static _Noreturn void refuse_json(const Text *text, const char *expected) {
  refuse("%s: expected JSON with %s, got something else", text->name, expected);
}

static char look(const Text *text) { return text->at < text->end ? *text->at : '\0'; }

static bool accept(Text *text, const char *wanted) {
  const size_t size = strlen(wanted);
  if ((size_t)(text->end - text->at) < size || memcmp(text->at, wanted, size) != 0) return false;
  text->at += size;
  return true;
}

static void skip_space(Text *text) {
  while (look(text) != '\0' && strchr(" \t\r\n", look(text)) != NULL) text->at++;
}

static uint32_t read_hex4(Text *text) {
  uint32_t code = 0;
  for (int i = 0; i < 4; ++i, ++text->at) {
    const char *digits = "0123456789abcdef0123456789ABCDEF";
    const char *digit = look(text) == '\0' ? NULL : strchr(digits, look(text));
    if (digit == NULL) refuse_json(text, "four hexadecimal digits");
    code = code * 16 + (uint32_t)((digit - digits) % 16);
  }
  return code;
}

static char *read_escape(Text *text, char *out) {
  const char *names = "\"\\/bfnrt", *meanings = "\"\\/\b\f\n\r\t";
  const char *found = look(text) == '\0' ? NULL : strchr(names, look(text));
  if (found != NULL) {
    text->at++;
    *out++ = meanings[found - names];
    return out;
  }
  if (!accept(text, "u")) refuse_json(text, "a known escape");
  uint32_t code = read_hex4(text);
  if (code >= 0xD800 && code < 0xE000) {
    const uint32_t low = code < 0xDC00 && accept(text, "\\u") ? read_hex4(text) : 0;
    if (low < 0xDC00 || low > 0xDFFF) refuse_json(text, "a whole surrogate pair");
    code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
  }
  if (code == 0) refuse_json(text, "no zero bytes in strings");
  const int tail = code < 0x80 ? 0 : code < 0x800 ? 1 : code < 0x10000 ? 2 : 3;
  const uint32_t marks[] = {0, 0xC0, 0xE0, 0xF0};
  *out++ = (char)(marks[tail] | (code >> (6 * tail)));
  for (int i = tail - 1; i >= 0; --i) *out++ = (char)(0x80 | ((code >> (6 * i)) & 0x3F));
  return out;
}

static char *read_string(Text *text) { /* behind the opening quote */
  const char *end = text->at;
  while (end < text->end && *end != '"') end += *end == '\\' ? 2 : 1;
  if (end >= text->end) refuse_json(text, "the end of a string");
  char *result = take((uint64_t)(end - text->at)); /* escapes only ever shrink */
  char *out = result;
  while (!accept(text, "\"")) {
    if ((unsigned char)look(text) < 0x20) refuse_json(text, "no control characters");
    if (accept(text, "\\")) {
      out = read_escape(text, out);
    } else {
      *out++ = *text->at++;
    }
  }
  return result;
}

static double read_number(Text *text) {
  const char *start = text->at;
  while (look(text) != '\0' && strchr("+-.0123456789eE", look(text)) != NULL) text->at++;
  char digits[64] = "";
  const size_t size = (size_t)(text->at - start);
  if (size == 0 || size >= sizeof digits) refuse_json(text, "a value");
  memcpy(digits, start, size);
  char *end = digits;
  const double number = strtod(digits, &end); /* the program keeps the "C" locale */
  if (*end != '\0' || !isfinite(number) || digits[0] == '+' || digits[0] == '.') {
    refuse_json(text, "a number");
  }
  return number;
}

static const Json *find(const Json *object, const char *key) {
  for (const Json *member = object->kind == OBJECT ? object->first : NULL; member != NULL;
       member = member->next) {
    if (strcmp(member->key, key) == 0) return member;
  }
  return NULL;
}

static Json *read_value(Text *text, int depth) {
  Json *value = take(sizeof *value);
  if (depth > MAX_DEPTH) refuse_json(text, "less nesting");
  skip_space(text);
  if (accept(text, "\"")) {
    value->kind = STRING;
    value->string = read_string(text);
  } else if (accept(text, "true") || accept(text, "false")) {
    value->kind = BOOLEAN;
  } else if (accept(text, "null")) {
    value->kind = NUL;
  } else if (look(text) != '{' && look(text) != '[') {
    value->kind = NUMBER;
    value->number = read_number(text);
  } else {
    value->kind = look(text) == '{' ? OBJECT : ARRAY;
    const char *close = look(text) == '{' ? "}" : "]";
    text->at++;
    skip_space(text);
    if (accept(text, close)) return value;
    Json **last = &value->first;
    do {
      char *key = NULL;
      if (value->kind == OBJECT) {
        skip_space(text);
        if (!accept(text, "\"")) refuse_json(text, "a key");
        key = read_string(text);
        if (find(value, key) != NULL) refuse_json(text, "each key once");
        skip_space(text);
        if (!accept(text, ":")) refuse_json(text, "a colon");
      }
      Json *item = read_value(text, depth + 1);
      item->key = key;
      *last = item;
      last = &(*last)->next;
      value->length++;
      skip_space(text);
    } while (accept(text, ","));
    if (!accept(text, close)) refuse_json(text, "a comma or the end of a list or an object");
  }
  return value;
}

static const Json *parse_json(const char *bytes, uint64_t size, const char *name) {
  Text text = {bytes, bytes + size, name};
  const Json *value = read_value(&text, 0);
  skip_space(&text);
  if (text.at != text.end) refuse_json(&text, "nothing behind its end");
  return value;
}

static const Json *need(const Json *object, const char *key, Kind kind, const char *name) {
  static const char *kinds[] = {"null", "true or false", "a number", "a string", "a list",
                                "an object"};
  const Json *value = find(object, key);
  if (value == NULL || value->kind != kind) {
    refuse("%s: %s: expected %s, got %s", name, key, kinds[kind],
           value == NULL ? "none" : kinds[value->kind]);
  }
  return value;
}

static uint64_t whole(const Json *value, const char *name) {
  if (value->kind != NUMBER || !(value->number >= 0 && value->number <= 9007199254740992.0) ||
      value->number != floor(value->number)) {
    refuse("%s: expected a whole number, got something else", name);
  }
  return (uint64_t)value->number;
}

/* ---- Files and SHA-256 (FIPS 180-4) --------------------------------------------------------- */

static FILE *open_file(const char *path, const char *name, uint64_t *size) {
  struct stat status;
  if (stat(path, &status) != 0 || !S_ISREG(status.st_mode)) {
    refuse("%s: expected a file, got no such file; copy the bundle again", name);
  }
  FILE *stream = fopen(path, "rb");
  if (stream == NULL) refuse("%s: expected a file that can be read, got %s", name, strerror(errno));
  *size = (uint64_t)status.st_size;
  return stream;
}

static char *read_file(const char *path, const char *name, uint64_t *size) {
  FILE *stream = open_file(path, name, size);
  if (*size > LARGEST_FILE) refuse("%s: expected at most 4 GiB, got more", name);
  char *content = take(*size);
  const size_t got = fread(content, 1, (size_t)*size, stream);
  fclose(stream);
  if (got != *size) refuse("%s: expected a file that can be read, got a part of it", name);
  return content;
}

static uint32_t rotate(uint32_t x, int n) { return (x >> n) | (x << (32 - n)); }

static void compress(uint32_t state[8], const unsigned char *block) {
  static const uint32_t round[64] = {
      0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4,
      0xab1c5ed5, 0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe,
      0x9bdc06a7, 0xc19bf174, 0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f,
      0x4a7484aa, 0x5cb0a9dc, 0x76f988da, 0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7,
      0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967, 0x27b70a85, 0x2e1b2138, 0x4d2c6dfc,
      0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85, 0xa2bfe8a1, 0xa81a664b,
      0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070, 0x19a4c116,
      0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
      0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7,
      0xc67178f2};
  uint32_t w[64], v[8];
  for (int i = 0; i < 16; ++i) {
    w[i] = (uint32_t)block[4 * i] << 24 | (uint32_t)block[4 * i + 1] << 16 |
           (uint32_t)block[4 * i + 2] << 8 | block[4 * i + 3];
  }
  for (int i = 16; i < 64; ++i) {
    const uint32_t x = w[i - 15], y = w[i - 2];
    w[i] = w[i - 16] + (rotate(x, 7) ^ rotate(x, 18) ^ (x >> 3)) + w[i - 7] +
           (rotate(y, 17) ^ rotate(y, 19) ^ (y >> 10));
  }
  memcpy(v, state, sizeof v);
  for (int i = 0; i < 64; ++i) {
    const uint32_t t = v[7] + (rotate(v[4], 6) ^ rotate(v[4], 11) ^ rotate(v[4], 25)) +
                       ((v[4] & v[5]) ^ (~v[4] & v[6])) + round[i] + w[i];
    const uint32_t u = (rotate(v[0], 2) ^ rotate(v[0], 13) ^ rotate(v[0], 22)) +
                       ((v[0] & v[1]) ^ (v[0] & v[2]) ^ (v[1] & v[2]));
    memmove(v + 1, v, 7 * sizeof *v);
    v[4] += t;
    v[0] = t + u;
  }
  for (int i = 0; i < 8; ++i) state[i] += v[i];
}

typedef struct {
  uint32_t state[8];
  unsigned char block[128];
  uint64_t total;
} Sha256;

static Sha256 sha256_begin(void) {
  return (Sha256){.state = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                            0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19}};
}

/* The last `got` bytes, up to 64, are in the block; all before them are compressed. */
static void sha256_end(Sha256 *hash, size_t got, char hex[65]) {
  const uint64_t bits = (hash->total + got) * 8;
  const size_t padded = got < 56 ? 64 : 128;
  memset(hash->block + got, 0, sizeof hash->block - got);
  hash->block[got] = 0x80;
  for (int i = 0; i < 8; ++i) hash->block[padded - 1 - i] = (unsigned char)(bits >> (8 * i));
  for (size_t start = 0; start < padded; start += 64) compress(hash->state, hash->block + start);
  for (int i = 0; i < 8; ++i) snprintf(hex + 8 * i, 9, "%08x", (unsigned)hash->state[i]);
}

static void sha256_of_file(const char *path, const char *name, char hex[65]) {
  Sha256 hash = sha256_begin();
  uint64_t size;
  FILE *stream = open_file(path, name, &size);
  size_t got;
  while ((got = fread(hash.block, 1, 64, stream)) == 64) {
    compress(hash.state, hash.block);
    hash.total += got;
  }
  const bool failed = ferror(stream) != 0;
  fclose(stream);
  if (failed) refuse("%s: expected a file that can be read, got a read error", name);
  sha256_end(&hash, got, hex);
}

static void sha256_of_text(const char *text, size_t size, char hex[65]) {
  Sha256 hash = sha256_begin();
  for (; size - hash.total >= 64; hash.total += 64) {
    compress(hash.state, (const unsigned char *)text + hash.total);
  }
  const size_t left = size - (size_t)hash.total;
  memcpy(hash.block, text + hash.total, left);
  sha256_end(&hash, left, hex);
}

/* ---- Tensors and .safetensors --------------------------------------------------------------- */

typedef struct Tensor {
  const char *name;
  ONNXTensorElementDataType type;
  int64_t shape[MAX_RANK];
  size_t rank;
  uint64_t count, bytes;
  unsigned char *data;
  struct Tensor *next;
} Tensor;

static const struct {
  const char *safetensors, *manifest;
  ONNXTensorElementDataType onnx;
  uint64_t size;
} types[] = {{"F32", "FLOAT", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, 4},
             {"F16", "FLOAT16", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16, 2},
             {"BF16", "BFLOAT16", ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16, 2},
             {"F64", "DOUBLE", ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE, 8},
             {"I64", "INT64", ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64, 8},
             {"I32", "INT32", ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32, 4},
             {"BOOL", "BOOL", ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL, 1}};
enum { TYPES = sizeof types / sizeof *types };

static float half_to_float(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const float magnitude = exponent == 31  ? (fraction ? NAN : INFINITY)
                          : exponent == 0 ? ldexpf((float)fraction, -24)
                                          : ldexpf((float)(1024 + fraction), exponent - 25);
  return bits & 0x8000 ? -magnitude : magnitude;
}

static uint16_t float_to_half(float value) { /* to nearest, ties to even */
  const uint16_t sign = signbit(value) ? 0x8000 : 0;
  const float magnitude = fabsf(value);
  if (magnitude == 0) return sign;
  if (!(magnitude < 65520.0F)) return sign | 0x7C00;
  int exponent;
  frexpf(magnitude, &exponent); /* magnitude = [0.5, 1) * 2^exponent */
  const int step = exponent < -13 ? -24 : exponent - 11;
  const uint32_t steps = (uint32_t)nearbyintf(ldexpf(magnitude, -step));
  return (uint16_t)(sign + (uint32_t)((step + 24) << 10) + steps);
}

static double element(const Tensor *tensor, uint64_t index) {
  uint16_t half;
  uint32_t bits;
  int32_t i32;
  int64_t i64;
  float real;
  double real64;
  switch (tensor->type) {
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT:
      memcpy(&real, tensor->data + 4 * index, 4);
      return real;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16:
      memcpy(&half, tensor->data + 2 * index, 2);
      return half_to_float(half);
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16:
      memcpy(&half, tensor->data + 2 * index, 2);
      bits = (uint32_t)half << 16;
      memcpy(&real, &bits, 4);
      return real;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE:
      memcpy(&real64, tensor->data + 8 * index, 8);
      return real64;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64:
      memcpy(&i64, tensor->data + 8 * index, 8);
      return (double)i64;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32:
      memcpy(&i32, tensor->data + 4 * index, 4);
      return i32;
    default:
      return tensor->data[index];
  }
}

static void multiply(Tensor *tensor, float factor) { /* rounds once to the tensor's type */
  for (uint64_t i = 0; i < tensor->count; ++i) {
    const double exact = element(tensor, i) * factor;
    const float product = (float)element(tensor, i) * factor;
    uint32_t bits;
    memcpy(&bits, &product, 4);
    const uint16_t half = tensor->type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16
                              ? float_to_half(product)
                              : (uint16_t)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
    if (tensor->type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT) {
      memcpy(tensor->data + 4 * i, &product, 4);
    } else if (tensor->type == ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE) {
      memcpy(tensor->data + 8 * i, &exact, 8);
    } else {
      memcpy(tensor->data + 2 * i, &half, 2);
    }
  }
}

static void require_finite(const Tensor *tensor, const char *file) {
  for (uint64_t i = 0; i < tensor->count; ++i) {
    if (!isfinite(element(tensor, i))) {
      refuse("%s: %s: expected finite numbers, got %f", file, tensor->name, element(tensor, i));
    }
  }
}

static const Tensor *find_tensor(const Tensor *tensors, const char *name) {
  while (tensors != NULL && strcmp(tensors->name, name) != 0) tensors = tensors->next;
  return tensors;
}

static Tensor *read_tensor(const Json *entry, const char *file, const char *data, uint64_t room) {
  Tensor *tensor = take(sizeof *tensor);
  tensor->name = entry->key;
  const char *dtype = need(entry, "dtype", STRING, entry->key)->string;
  uint64_t size = 0;
  for (int i = 0; i < TYPES; ++i) {
    if (strcmp(types[i].safetensors, dtype) != 0) continue;
    tensor->type = types[i].onnx;
    size = types[i].size;
  }
  if (size == 0) refuse("%s: %s: expected a known dtype, got %s", file, entry->key, dtype);
  const Json *shape = need(entry, "shape", ARRAY, entry->key);
  if (shape->length > MAX_RANK) refuse("%s: %s: expected fewer axes", file, entry->key);
  tensor->count = 1;
  bool fits = true;
  for (const Json *item = shape->first; item != NULL; item = item->next) {
    const uint64_t length = whole(item, entry->key);
    tensor->shape[tensor->rank++] = (int64_t)length;
    fits = fits && (length == 0 || tensor->count <= room / length);
    tensor->count = fits ? tensor->count * length : 0;
  }
  const Json *offsets = need(entry, "data_offsets", ARRAY, entry->key);
  if (offsets->length != 2) refuse("%s: %s: expected two data_offsets", file, entry->key);
  const uint64_t begin = whole(offsets->first, entry->key);
  const uint64_t end = whole(offsets->first->next, entry->key);
  if (!fits || begin > end || end > room || end - begin != tensor->count * size) {
    refuse("%s: %s: expected data inside the file that fits its shape, got bytes %llu to %llu",
           file, entry->key, (unsigned long long)begin, (unsigned long long)end);
  }
  tensor->bytes = end - begin;
  tensor->data = take(tensor->bytes);
  memcpy(tensor->data, data + begin, (size_t)tensor->bytes);
  require_finite(tensor, file);
  return tensor;
}

static Tensor *read_safetensors(const char *path, const char *file) {
  uint64_t size, header = 0;
  const char *content = read_file(path, file, &size);
  for (int i = 7; i >= 0 && size >= 8; --i) header = header << 8 | (unsigned char)content[i];
  if (size < 8 || header > size - 8) {
    refuse("%s: expected a .safetensors file with a whole header, got %llu bytes", file,
           (unsigned long long)size);
  }
  const Json *document = parse_json(content + 8, header, file);
  if (document->kind != OBJECT) refuse("%s: expected a header with tensors, got none", file);
  Tensor *tensors = NULL;
  for (const Json *entry = document->first; entry != NULL; entry = entry->next) {
    if (strcmp(entry->key, "__metadata__") == 0) continue;
    Tensor *tensor = read_tensor(entry, file, content + 8 + header, size - 8 - header);
    tensor->next = tensors;
    tensors = tensor;
  }
  return tensors;
}

/* ---- The manifest --------------------------------------------------------------------------- */

typedef struct {
  const char *directory;
  const Json *manifest;
} Bundle;

static const Json *section(const Bundle *bundle, const char *key, Kind kind) {
  return need(bundle->manifest, key, kind, "manifest.json");
}

static bool stays_inside(const char *path) {
  if (*path == '\0' || *path == '/' || strpbrk(path, "\\:") != NULL) return false;
  for (const char *part = path; part != NULL; part = strchr(part, '/')) {
    part += *part == '/';
    if (strncmp(part, "..", 2) == 0 && (part[2] == '/' || part[2] == '\0')) return false;
  }
  return true;
}

static char *path_of(const Bundle *bundle, const char *file) {
  return join(join(bundle->directory, "/"), file);
}

/* The path inside the bundle that `key` names; the manifest must have a hash for it. */
static const char *listed(const Bundle *bundle, const Json *entry, const char *key) {
  const char *file = need(entry, key, STRING, "manifest.json")->string;
  if (find(section(bundle, "files", OBJECT), file) == NULL) {
    refuse("manifest.json: %s: expected a path that \"files\" has a hash for, got \"%s\"", key,
           file);
  }
  return file;
}

/* The manifest ends with the sha256 of every byte before the digits of that. */
static void require_seal(const char *text, size_t size) {
  static const char member[] = "\"manifest_sha256\": \"", end[] = "\"\n}\n";
  const size_t member_size = sizeof member - 1, tail = 64 + sizeof end - 1;
  char hex[65];
  if (size < member_size + tail || memcmp(text + size - tail - member_size, member, member_size) ||
      memcmp(text + size - tail + 64, end, sizeof end - 1)) {
    refuse("manifest.json: expected its own sha256 at its end, got none; it is damaged or was "
           "edited: copy the bundle again");
  }
  sha256_of_text(text, size - tail, hex);
  if (memcmp(hex, text + size - tail, 64) != 0) {
    refuse("manifest.json: expected sha256 %.12s, got %.12s; it is damaged or was edited: copy the "
           "bundle again", text + size - tail, hex);
  }
}

static Bundle open_bundle(const char *directory) {
  Bundle bundle = {directory, NULL};
  uint64_t size;
  const char *text = read_file(path_of(&bundle, "manifest.json"), "manifest.json", &size);
  require_seal(text, (size_t)size);
  bundle.manifest = parse_json(text, size, "manifest.json");
  const double version = section(&bundle, "schema_version", NUMBER)->number;
  if (version != 1) {
    refuse("manifest.json: expected schema version 1, got %g; use a program made for that version",
           version);
  }
  for (const Json *file = section(&bundle, "files", OBJECT)->first; file; file = file->next) {
    char hex[65];
    if (!stays_inside(file->key)) {
      refuse("manifest.json: expected paths inside the bundle, got \"%s\"", file->key);
    }
    if (file->kind != STRING) refuse("%s: expected a sha256, got something else", file->key);
    sha256_of_file(path_of(&bundle, file->key), file->key, hex);
    if (strcmp(hex, file->string) != 0) {
      refuse("%s: expected sha256 %.12s, got %.12s; copy the bundle again", file->key, file->string,
             hex);
    }
  }
  if (!(section(&bundle, "tolerance", NUMBER)->number >= 0)) {
    refuse("manifest.json: tolerance: expected 0 or more, got a negative number");
  }
  return bundle;
}

/* ---- Adapters and blends -------------------------------------------------------------------- */

static void require_fit(const Bundle *bundle, const Tensor *tensors, const char *file) {
  size_t claimed = 0, present = 0;
  for (const Tensor *tensor = tensors; tensor != NULL; tensor = tensor->next) present++;
  for (const Json *slot = section(bundle, "slots", ARRAY)->first; slot; slot = slot->next) {
    const char *name = need(slot, "name", STRING, "slots")->string;
    const char *dtype = need(slot, "dtype", STRING, name)->string;
    const Json *inputs = need(slot, "inputs", OBJECT, name);
    const Tensor *a = find_tensor(tensors, need(inputs, "lora_A", STRING, name)->string);
    const Tensor *b = find_tensor(tensors, need(inputs, "lora_B", STRING, name)->string);
    const uint64_t in = whole(need(slot, "in_features", NUMBER, name), name);
    const uint64_t out = whole(need(slot, "out_features", NUMBER, name), name);
    if (a == NULL && b == NULL) continue;
    if (a == NULL || b == NULL) {
      refuse("%s: %s: expected lora_A and lora_B, got one", file, name);
    }
    claimed += 2;
    if (a->rank != 2 || b->rank != 2 || a->shape[0] != (int64_t)in || b->shape[1] != (int64_t)out ||
        a->shape[1] != b->shape[0] || a->shape[1] < 1) {
      refuse("%s does not fit this bundle's base: %s: expected [%llu, r] and [r, %llu], "
             "got [%lld, %lld] and [%lld, %lld]",
             file, name, (unsigned long long)in, (unsigned long long)out, (long long)a->shape[0],
             (long long)a->shape[1], (long long)b->shape[0], (long long)b->shape[1]);
    }
    for (int i = 0; i < TYPES; ++i) {
      const bool wanted = strcmp(types[i].manifest, dtype) == 0;
      if (wanted != (types[i].onnx == a->type) || wanted != (types[i].onnx == b->type)) {
        refuse("%s: %s: expected tensors of type %s, got another", file, name, dtype);
      }
    }
  }
  if (claimed != present) {
    refuse("%s does not fit this bundle's base: expected slots for all %zu tensors, got %zu; this "
           "program takes LoRA on linear layers alone", file, present, claimed);
  }
}

/* Appends a copy of a tensor [rows, cols] to a list, or grows the one of that name by it: A along
 * its columns (the rank), B along its rows. */
static void append(Tensor **blended, const Tensor *part, bool columns) {
  Tensor *sum = (Tensor *)find_tensor(*blended, part->name);
  if (sum == NULL) {
    sum = take(sizeof *sum);
    *sum = *part;
    sum->next = *blended;
    *blended = sum;
    return;
  }
  unsigned char *data = take(sum->bytes + part->bytes), *out = data;
  const uint64_t rows = columns ? (uint64_t)part->shape[0] : 1;
  for (uint64_t row = 0; row < rows; ++row) {
    memcpy(out, sum->data + row * (sum->bytes / rows), (size_t)(sum->bytes / rows));
    out += sum->bytes / rows;
    memcpy(out, part->data + row * (part->bytes / rows), (size_t)(part->bytes / rows));
    out += part->bytes / rows;
  }
  sum->data = data;
  sum->bytes += part->bytes;
  sum->count += part->count;
  sum->shape[columns ? 1 : 0] += part->shape[columns ? 1 : 0];
}

/* The exact weighted sum: A side by side, strength * B one below another. */
static Tensor *blend(const Bundle *bundle, const Json *strengths) {
  Tensor *blended = NULL;
  for (const Json *entry = strengths->first; entry != NULL; entry = entry->next) {
    const Json *adapter =
        need(section(bundle, "adapters", OBJECT), entry->key, OBJECT, "manifest.json: adapters");
    const char *file = listed(bundle, adapter, "tensors");
    Tensor *tensors = read_safetensors(path_of(bundle, file), file);
    require_fit(bundle, tensors, file);
    if (entry->kind != NUMBER) refuse("%s: expected a strength, got something else", entry->key);
    for (const Json *slot = section(bundle, "slots", ARRAY)->first; slot; slot = slot->next) {
      const Json *inputs = find(slot, "inputs");
      const Tensor *a = find_tensor(tensors, find(inputs, "lora_A")->string);
      Tensor *b = (Tensor *)find_tensor(tensors, find(inputs, "lora_B")->string);
      if (a == NULL) continue;
      multiply(b, (float)entry->number);
      append(&blended, a, true);
      append(&blended, b, false);
    }
  }
  return blended;
}

/* ---- ONNX Runtime --------------------------------------------------------------------------- */

static const OrtApi *ort;

static void require_ok(OrtStatus *status, const char *what) {
  if (status == NULL) return;
  char *message = join("", ort->GetErrorMessage(status));
  ort->ReleaseStatus(status);
  message[strcspn(message, "\n")] = '\0'; /* a stack trace may follow */
  refuse("%s: %s", what, message);
}

static void load_onnxruntime(const char *path) {
  void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (library == NULL) refuse("%s; give ONNX Runtime's library with --ort", dlerror());
  const OrtApiBase *(*get_base)(void) = NULL;
  *(void **)&get_base = dlsym(library, "OrtGetApiBase"); /* as POSIX has it */
  if (get_base == NULL) refuse("library %s: expected ONNX Runtime, got another", path);
  ort = get_base()->GetApi(ORT_API_VERSION);
  if (ort == NULL) {
    refuse("library %s: expected ONNX Runtime 1.%d or newer, as the headers, got %s", path,
           ORT_API_VERSION, get_base()->GetVersionString());
  }
}

static OrtSession *open_session(const Bundle *bundle, OrtEnv *env, bool cuda) {
  OrtSessionOptions *options;
  OrtSession *session;
  require_ok(ort->CreateSessionOptions(&options), "session options");
  if (cuda) {
    const char *key = "use_tf32", *value = "0"; /* 10-bit mantissas: golden values would differ */
    OrtCUDAProviderOptionsV2 *provider;
    require_ok(ort->CreateCUDAProviderOptions(&provider), "--cuda");
    require_ok(ort->UpdateCUDAProviderOptions(provider, &key, &value, 1), "--cuda");
    require_ok(ort->SessionOptionsAppendExecutionProvider_CUDA_V2(options, provider), "--cuda");
    ort->ReleaseCUDAProviderOptions(provider);
  }
  const char *model = listed(bundle, bundle->manifest, "model");
  require_ok(ort->CreateSession(env, path_of(bundle, model), options, &session), model);
  ort->ReleaseSessionOptions(options);
  return session;
}

static OrtValue *view(const Tensor *tensor) { /* the tensor must outlive it */
  OrtMemoryInfo *memory;
  OrtValue *value;
  require_ok(ort->CreateCpuMemoryInfo(OrtDeviceAllocator, OrtMemTypeDefault, &memory), "memory");
  require_ok(ort->CreateTensorWithDataAsOrtValue(memory, tensor->data, (size_t)tensor->bytes,
                                                 tensor->shape, tensor->rank, tensor->type, &value),
             tensor->name);
  ort->ReleaseMemoryInfo(memory);
  return value;
}

static OrtLoraAdapter *read_onnx_adapter(const Bundle *bundle, const char *name) {
  const Json *adapter = need(section(bundle, "adapters", OBJECT), name, OBJECT, "manifest.json");
  const char *file = listed(bundle, adapter, "file");
  uint64_t size;
  const char *content = read_file(path_of(bundle, file), file, &size);
  OrtLoraAdapter *result; /* has a copy of the bytes */
  require_ok(ort->CreateLoraAdapterFromArray(content, (size_t)size, NULL, &result), file);
  return result;
}

/* Writes a run's values one after the other; false for another shape or what is no number. */
static bool read_values(const Tensor *expected, const OrtValue *value, double *here) {
  OrtTensorTypeAndShapeInfo *info;
  Tensor got = {.name = expected->name};
  require_ok(ort->GetTensorTypeAndShape(value, &info), expected->name);
  require_ok(ort->GetTensorElementType(info, &got.type), expected->name);
  require_ok(ort->GetDimensionsCount(info, &got.rank), expected->name);
  const bool same_rank = got.rank == expected->rank;
  if (same_rank) require_ok(ort->GetDimensions(info, got.shape, got.rank), expected->name);
  ort->ReleaseTensorTypeAndShapeInfo(info);
  if (!same_rank || got.type != expected->type || expected->count == 0 ||
      memcmp(got.shape, expected->shape, sizeof got.shape) != 0) {
    return false;
  }
  const void *data;
  require_ok(ort->GetTensorData(value, &data), expected->name);
  got.data = (unsigned char *)data;
  for (uint64_t i = 0; i < expected->count; ++i) {
    here[i] = element(&got, i);
    if (!isfinite(here[i])) return false;
  }
  return true;
}

/* ---- The replay ----------------------------------------------------------------------------- */

/* A golden case; `expected` has all outputs, one after the other. */
typedef struct {
  const Json *entry, *strengths;
  const Tensor *tensors;
  double *expected;
  uint64_t count;
} Case;

/* All of them, the base's among them, and what the base gives here. */
typedef struct {
  Case *cases;
  size_t length;
  const Case *base;
  double *own_base; /* NULL where it cannot be compared */
} Golden;

static bool is_output(const Tensor *tensor) { return strncmp(tensor->name, "output.", 7) == 0; }

static Case read_case(const Bundle *bundle, const Json *entry) {
  const char *file = listed(bundle, entry, "file");
  Case read = {.entry = entry, .strengths = find(entry, "adapters")};
  read.tensors = read_safetensors(path_of(bundle, file), file);
  bool any = false;
  for (const Tensor *tensor = read.tensors; tensor != NULL; tensor = tensor->next) {
    any = any || is_output(tensor);
    if (is_output(tensor)) read.count += tensor->count;
  }
  if (!any) refuse("%s: expected outputs, got none", file);
  double *next = read.expected = take(read.count * sizeof *next);
  for (const Tensor *tensor = read.tensors; tensor != NULL; tensor = tensor->next) {
    for (uint64_t i = 0; is_output(tensor) && i < tensor->count; ++i) *next++ = element(tensor, i);
  }
  return read;
}

/* Runs one case, with slot tensors as inputs or with ONNX Runtime's own adapter, and writes all
   outputs; false where they cannot be compared. */
static bool run_case(OrtSession *session, const Case *golden, const Tensor *slots,
                     const OrtLoraAdapter *adapter, double *here) {
  const char *name = golden->entry->key;
  size_t most = 0, inputs = 0, outputs = 0;
  for (const Tensor *tensor = golden->tensors; tensor != NULL; tensor = tensor->next) most++;
  for (const Tensor *tensor = slots; tensor != NULL; tensor = tensor->next) most++;
  const char **input_names = take(most * sizeof *input_names);
  const char **output_names = take(most * sizeof *output_names);
  const Tensor **fed = take(most * sizeof *fed), **expected = take(most * sizeof *expected);
  OrtValue **values = take(most * sizeof *values), **results = take(most * sizeof *results);
  for (const Tensor *tensor = golden->tensors; tensor != NULL; tensor = tensor->next) {
    if (strncmp(tensor->name, "input.", 6) == 0) {
      input_names[inputs] = tensor->name + 6;
      fed[inputs++] = tensor;
    } else if (is_output(tensor)) {
      output_names[outputs] = tensor->name + 7;
      expected[outputs++] = tensor;
    }
  }
  for (const Tensor *tensor = slots; tensor != NULL; tensor = tensor->next) {
    require_finite(tensor, "blend");
    input_names[inputs] = tensor->name;
    fed[inputs++] = tensor;
  }
  OrtRunOptions *options;
  require_ok(ort->CreateRunOptions(&options), "run options");
  if (adapter) require_ok(ort->RunOptionsAddActiveLoraAdapter(options, adapter), name);
  for (size_t i = 0; i < inputs; ++i) values[i] = view(fed[i]);
  OrtStatus *status = ort->Run(session, options, input_names, (const OrtValue *const *)values,
                               inputs, output_names, outputs, results);
  for (size_t i = 0; i < inputs; ++i) ort->ReleaseValue(values[i]);
  require_ok(status, name);
  bool comparable = true;
  for (size_t i = 0; i < outputs; ++i) {
    comparable = comparable && read_values(expected[i], results[i], here);
    here += expected[i]->count;
    ort->ReleaseValue(results[i]);
  }
  ort->ReleaseRunOptions(options);
  return comparable;
}

/* The product of two changes: of a from a0, and of b from b0. */
static double product(const double *a, const double *a0, const double *b, const double *b0,
                      uint64_t count) {
  double sum = 0;
  for (uint64_t i = 0; i < count; ++i) sum += (a[i] - a0[i]) * (b[i] - b0[i]);
  return sum;
}

/* The cosine of the angle between the change here and a case's golden one; 0 where one is nothing,
   1 where both are. */
static double along(const Golden *golden, const Case *other, const double *here) {
  const double *own = golden->own_base, *base = golden->base->expected;
  const uint64_t count = golden->base->count;
  if (other->count != count) return -1;
  const double first = product(here, own, here, own, count);
  const double second = product(other->expected, base, other->expected, base, count);
  if (first == 0 && second == 0) return 1;
  const double both = product(here, own, other->expected, base, count);
  return both == 0 ? 0 : both / sqrt(first * second);
}

/* Whether outputs lie from the base's here as the golden ones lie from theirs, and not as another
   adapter's do: the proof of a swap where the tolerance is as wide as its effect. */
static bool changes_the_base(const Golden *golden, const Case *entry, const double *here) {
  const double *own = golden->own_base, *base = golden->base->expected;
  const uint64_t count = golden->base->count;
  if (own == NULL || entry->count != count) return false;
  const double direction = along(golden, entry, here);
  const double effect = product(entry->expected, base, entry->expected, base, count);
  /* The change is between two runs, each with its own rounding; squares here. */
  if (effect <= 4 * product(own, base, own, base, count)) return direction != 0;
  bool right = direction > 0;
  for (size_t i = 0; i < golden->length && right && entry->strengths->length == 1; ++i) {
    /* A blend lies between its adapters, so it is not asked to be told from them. */
    const Case *rival = &golden->cases[i];
    right = rival->strengths->length != 1 || along(golden, rival, here) <= direction;
  }
  return right;
}

static bool replay(const Bundle *bundle, OrtSession *session, const Golden *golden,
                   const Case *entry, const char *note, const Tensor *slots,
                   const OrtLoraAdapter *adapter) {
  double *here = take(entry->count * sizeof *here), largest = 0;
  if (!run_case(session, entry, slots, adapter, here)) largest = HUGE_VAL;
  for (uint64_t i = 0; i < entry->count && isfinite(largest); ++i) {
    largest = fmax(largest, fabs(here[i] - entry->expected[i]));
  }
  const double tolerance = section(bundle, "tolerance", NUMBER)->number;
  const bool near = largest <= tolerance;
  const bool changed =
      !near || entry->strengths->length == 0 || changes_the_base(golden, entry, here);
  printf("%-6s %s%s: largest difference %.3g, allowed %.3g%s\n", near && changed ? "ok" : "FAILED",
         entry->entry->key, note, largest, tolerance,
         changed ? "" : "; changes the base otherwise than its golden outputs do");
  return near && changed;
}

static bool is_alone(const Json *strengths, const char *name) {
  return strengths->length == 1 && strengths->first->number == 1 &&
         (name == NULL || strcmp(strengths->first->key, name) == 0);
}

/* Without a case of its own an adapter would be shipped unproved. */
static void require_cases(const Bundle *bundle) {
  bool base = false;
  const Json *cases = section(bundle, "golden", OBJECT);
  for (const Json *entry = cases->first; entry != NULL; entry = entry->next) {
    const Json *strengths = need(entry, "adapters", OBJECT, entry->key); /* of every case */
    base = base || strengths->length == 0;
  }
  if (!base) refuse("manifest.json: the base: expected a golden case, got none");
  for (const Json *adapter = section(bundle, "adapters", OBJECT)->first; adapter != NULL;
       adapter = adapter->next) {
    bool found = false;
    for (const Json *entry = cases->first; entry != NULL; entry = entry->next) {
      found = found || is_alone(find(entry, "adapters"), adapter->key);
    }
    if (!found) {
      refuse("manifest.json: adapter %s: expected a golden case, got none", adapter->key);
    }
  }
}

static bool replay_all(const Bundle *bundle, OrtSession *session) {
  const Json *cases = section(bundle, "golden", OBJECT);
  Golden golden = {.cases = take(cases->length * sizeof *golden.cases)};
  for (const Json *entry = cases->first; entry != NULL; entry = entry->next) {
    Case *read = &golden.cases[golden.length++];
    *read = read_case(bundle, entry);
    if (read->strengths->length == 0) golden.base = read;
  }
  golden.own_base = take(golden.base->count * sizeof *golden.own_base);
  if (!run_case(session, golden.base, blend(bundle, golden.base->strengths), NULL,
                golden.own_base)) {
    golden.own_base = NULL;
  }
  bool passed = true;
  for (size_t i = 0; i < golden.length; ++i) {
    const Case *entry = &golden.cases[i];
    const Tensor *slots = blend(bundle, entry->strengths);
    passed = replay(bundle, session, &golden, entry, "", slots, NULL) && passed;
    if (!is_alone(entry->strengths, NULL)) continue;
    OrtLoraAdapter *adapter = read_onnx_adapter(bundle, entry->strengths->first->key);
    passed = replay(bundle, session, &golden, entry, " (.onnx_adapter)", NULL, adapter) && passed;
    ort->ReleaseLoraAdapter(adapter);
  }
  return passed;
}

int main(int argc, char **argv) {
  const char *directory = NULL, *library = getenv("LORAPORT_ORT");
  bool cuda = false;
  atexit(free_everything);
  for (int i = 1; i < argc; ++i) {
    if (strcmp(argv[i], "--cuda") == 0) {
      cuda = true;
    } else if (strcmp(argv[i], "--ort") == 0 && i + 1 < argc) {
      library = argv[++i];
    } else if (argv[i][0] != '-' && directory == NULL) {
      directory = argv[i];
    } else {
      refuse("%s: expected loraport_check BUNDLE [--ort PATH] [--cuda]", argv[i]);
    }
  }
  if (directory == NULL) refuse("BUNDLE: expected a folder; loraport_check BUNDLE [--ort PATH]");
  load_onnxruntime(library != NULL ? library : "libonnxruntime.so");
  const Bundle bundle = open_bundle(directory);
  require_cases(&bundle);
  OrtEnv *env; /* its log would only repeat what errors say, and warn of every slot */
  require_ok(ort->CreateEnv(ORT_LOGGING_LEVEL_FATAL, "loraport", &env), "environment");
  OrtSession *session = open_session(&bundle, env, cuda);
  const bool passed = replay_all(&bundle, session);
  ort->ReleaseSession(session);
  ort->ReleaseEnv(env);
  return passed ? DONE : MISMATCH;
}
