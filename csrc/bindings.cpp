// The table of contents of tokenmill._C: every function that Python sees. Types and shapes stand in _C.pyi.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "assemble.hpp"
#include "checksum.hpp"
#include "mixture.hpp"
#include "packing.hpp"
#include "permutation.hpp"
#include "philox.hpp"
#include "piece_cache.hpp"

namespace py = pybind11;
using namespace tokenmill;

namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;
using Int64s = py::array_t<std::int64_t, py::array::c_style | py::array::forcecast>;

template <class T, int Flags>
std::span<const T> view(const py::array_t<T, Flags>& array) {
  return {array.data(), static_cast<std::size_t>(array.size())};
}

py::array_t<float> make_neftune_uniform(std::uint64_t seed, std::uint64_t step, std::int64_t document_id,
                                        std::uint32_t position, std::int64_t count, std::int64_t dim) {
  if (count < 0 || dim < 0) throw std::invalid_argument("count and dim must not be negative");
  py::array_t<float> out({count, dim});
  float* data = out.mutable_data();
  py::gil_scoped_release release;
  neftune_uniform(seed, step, document_id, position, count, dim, data);
  return out;
}

py::array_t<std::uint64_t> make_permutation(std::uint64_t n, std::uint64_t key, std::uint64_t start,
                                            std::uint64_t count) {
  const Permutation permutation(n, key);
  if (count > n) throw std::invalid_argument("count " + std::to_string(count) + " is above n = " + std::to_string(n));
  py::array_t<std::uint64_t> out(count);
  std::uint64_t* data = out.mutable_data();
  py::gil_scoped_release release;
  permutation.fill(start, count, data);
  return out;
}

template <class T>
py::array_t<T> to_array(const std::vector<T>& values) {
  return py::array_t<T>(values.size(), values.data());
}

py::tuple make_packs(const Int64s& lengths, std::int64_t capacity) {
  Packs packs;
  {
    const auto values = view(lengths);
    py::gil_scoped_release release;
    packs = pack(values, capacity);
  }
  return py::make_tuple(to_array(packs.offsets), to_array(packs.items));
}

py::tuple draw(Mixture& mixture, std::uint64_t start, std::uint64_t count) {
  py::array_t<std::uint16_t> sources(count);
  py::array_t<std::uint64_t> draws(count);
  std::uint16_t* source_data = sources.mutable_data();
  std::uint64_t* draw_data = draws.mutable_data();
  Mixture moving = mixture;  // a copy to work on without the GIL: another thread may be drawing too
  {
    py::gil_scoped_release release;
    moving.draw(start, count, source_data, draw_data);
  }
  mixture = moving;
  return py::make_tuple(sources, draws);
}

std::vector<Shard> as_shards(const std::vector<py::array>& tokens, const std::vector<Array<std::uint64_t>>& silent) {
  if (tokens.size() != silent.size()) throw std::invalid_argument("one array of silent spans a shard is needed");
  std::vector<Shard> shards;
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    Shard shard{std::span<const std::uint16_t>{}, view(silent[i])};
    if (py::isinstance<Array<std::uint16_t>>(tokens[i]))
      shard.tokens = view(py::reinterpret_borrow<Array<std::uint16_t>>(tokens[i]));
    else if (py::isinstance<Array<std::uint32_t>>(tokens[i]))
      shard.tokens = view(py::reinterpret_borrow<Array<std::uint32_t>>(tokens[i]));
    else
      throw std::invalid_argument("shard " + std::to_string(i) + " must be a contiguous array of uint16 or uint32");
    shards.push_back(shard);
  }
  return shards;
}

template <class T>
std::span<T> rows_of(Array<T>& array, const char* name) {
  if (array.ndim() != 1)
    throw std::invalid_argument(std::string(name) + " has " + std::to_string(array.ndim()) +
                                " dimensions of entries, expected 1");
  return {array.mutable_data(), static_cast<std::size_t>(array.size())};
}

std::int64_t fill_batch(const std::vector<py::array>& tokens, const std::vector<Array<std::uint64_t>>& silent,
                        const Int64s& shard, const Int64s& start, const Int64s& length,
                        Array<std::int32_t>& out_tokens, Array<std::int64_t>& targets, Array<float>& weights,
                        Array<std::int32_t>& positions, Array<std::int32_t>& target_rows,
                        Array<std::int32_t>& cu_seqlens) {
  const std::vector<Shard> shards = as_shards(tokens, silent);
  const Parts parts{view(shard), view(start), view(length)};
  const Rows rows{rows_of(out_tokens, "out_tokens"), rows_of(targets, "targets"), rows_of(weights, "weights"),
                  rows_of(positions, "positions"), rows_of(target_rows, "target_rows"),
                  rows_of(cu_seqlens, "cu_seqlens")};
  py::gil_scoped_release release;
  return assemble(shards, parts, rows);
}

std::int64_t find_damaged_part(const std::vector<py::array>& tokens, const std::vector<Array<std::uint32_t>>& crc32,
                               std::vector<Array<bool>>& checked, const Int64s& shard, const Int64s& start,
                               const Int64s& length, std::uint64_t block) {
  const std::vector<Shard> shards = as_shards(tokens, std::vector<Array<std::uint64_t>>(tokens.size()));
  if (crc32.size() != checked.size()) throw std::invalid_argument("one list of sums a shard is needed");
  std::vector<BlockSums> sums;
  for (std::size_t i = 0; i < crc32.size(); ++i)
    sums.push_back({view(crc32[i]), {checked[i].mutable_data(), static_cast<std::size_t>(checked[i].size())}});
  const Parts parts{view(shard), view(start), view(length)};
  py::gil_scoped_release release;
  return find_damaged(shards, sums, parts, block);
}

py::tuple encode_texts(PieceCache& cache, const py::list& list, const py::function& encode_words) {
  const py::tuple texts(list);  // of our own: it holds the texts where another thread changes the list
  std::vector<std::string_view> views;
  for (const py::handle text : texts) {
    if (!PyUnicode_Check(text.ptr()))
      throw py::type_error("texts[" + std::to_string(views.size()) + "] is a " + Py_TYPE(text.ptr())->tp_name +
                           ", expected a str");
    py::ssize_t size = 0;
    const char* data = PyUnicode_AsUTF8AndSize(text.ptr(), &size);
    if (!data) throw py::error_already_set();
    views.emplace_back(data, static_cast<std::size_t>(size));
  }
  py::array_t<std::int64_t> offsets(static_cast<py::ssize_t>(views.size() + 1));
  std::int64_t* offset_data = offsets.mutable_data();
  py::array_t<std::int32_t> ids;
  {
    py::gil_scoped_release release;  // the cache's lock is always taken without it, so waiting for it inside is safe
    cache.encode(
        views, {offset_data, views.size() + 1},
        [&](const std::vector<std::string_view>& missing) {
          py::gil_scoped_acquire acquire;
          py::list words;
          for (const std::string_view word : missing) words.append(py::bytes(word));
          return encode_words(words).cast<std::vector<std::vector<std::int32_t>>>();
        },
        [&](std::int64_t count) {
          py::gil_scoped_acquire acquire;
          ids = py::array_t<std::int32_t>(count);
          return ids.mutable_data();
        });
  }
  return py::make_tuple(ids, offsets);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "tokenmill's host core: random numbers, the order of samples, packing, mixing, batches and encoding.";

  m.def("philox", &philox, py::arg("counter"), py::arg("key"));
  m.def("neftune_uniform", &make_neftune_uniform, py::arg("seed"), py::arg("step"), py::arg("document_id"),
        py::arg("position"), py::arg("count"), py::arg("dim"));

  m.def("derive_key", &derive_key, py::arg("seed"), py::arg("source"), py::arg("epoch"));
  m.def(
      "permute", [](std::uint64_t index, std::uint64_t n, std::uint64_t key) { return Permutation(n, key)(index); },
      py::arg("index"), py::arg("n"), py::arg("key"));
  m.def("permutation", &make_permutation, py::arg("n"), py::arg("key"), py::arg("start"), py::arg("count"));

  m.def("pack", &make_packs, py::arg("lengths"), py::arg("capacity"));

  py::class_<Mixture>(m, "Mixture")
      .def(py::init([](const Array<std::uint64_t>& starts, const Array<std::uint64_t>& shares) {
             if (starts.ndim() != 1 || shares.ndim() != 2 || shares.shape(0) != starts.shape(0))
               throw std::invalid_argument("starts must be (P,) and shares (P, m)");
             return Mixture(view(starts), view(shares));
           }),
           py::arg("starts").noconvert(), py::arg("shares").noconvert())
      .def("draw", &draw, py::arg("start"), py::arg("count"))
      .def(
          "seek",
          [](Mixture& mixture, std::uint64_t position, const Array<std::uint64_t>& counts) {
            mixture.seek(position, view(counts));
          },
          py::arg("position"), py::arg("counts").noconvert())
      .def_property_readonly("counts", [](const Mixture& m) { return to_array(m.counts()); })
      .def_readonly_static("WHOLE", &Mixture::kWhole);

  py::class_<PieceCache>(m, "PieceCache")
      .def(py::init([](const Array<std::uint8_t>& joins, bool adds_space, std::size_t limit) {
             return std::make_unique<PieceCache>(view(joins), adds_space, limit);
           }),
           py::arg("joins").noconvert(), py::arg("adds_space"), py::arg("limit") = std::size_t{1} << 27)
      .def("__len__", &PieceCache::size)
      .def("encode", &encode_texts, py::arg("texts"), py::arg("encode_words"));

  m.def("assemble", &fill_batch, py::arg("tokens"), py::arg("silent"), py::arg("shard"), py::arg("start"),
        py::arg("length"), py::arg("out_tokens").noconvert(), py::arg("targets").noconvert(),
        py::arg("weights").noconvert(), py::arg("positions").noconvert(), py::arg("target_rows").noconvert(),
        py::arg("cu_seqlens").noconvert());
  m.def("find_damaged", &find_damaged_part, py::arg("tokens"), py::arg("crc32"), py::arg("checked"), py::arg("shard"),
        py::arg("start"), py::arg("length"), py::arg("block"));
}
