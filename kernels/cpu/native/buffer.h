// Memory that is used again and again.
#pragma once

#include <cstdlib>
#include <memory>

namespace native {

// Owns 64-byte aligned memory that only grows.
class Buffer {
  public:
    template <class T>
    T* take(int64_t count) {
        const size_t bytes = (count * sizeof(T) + 63) / 64 * 64;
        if (bytes > size_) {
            data_.reset(static_cast<char*>(std::aligned_alloc(64, bytes)));
            size_ = bytes;
        }
        return reinterpret_cast<T*>(data_.get());
    }

  private:
    struct Free {
        void operator()(char* p) const { std::free(p); }
    };
    std::unique_ptr<char, Free> data_;
    size_t size_ = 0;
};

}  // namespace native
