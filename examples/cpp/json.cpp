#include "json.hpp"

#include <cmath>
#include <cstdlib>
#include <stdexcept>

namespace hdrq {

namespace {
constexpr int kDeepest = 64;
}

class JsonReader {
public:
    explicit JsonReader(const std::string& text) : text_(text) {}

    Json whole() {
        Json value = read(0);
        skip();
        if (at_ != text_.size()) fail("nothing more");
        return value;
    }

private:
    [[noreturn]] void fail(const std::string& needed) const {
        throw std::runtime_error("JSON: needed " + needed + " at byte " + std::to_string(at_));
    }

    void skip() {
        while (at_ < text_.size() && (text_[at_] == ' ' || text_[at_] == '\t' ||
                                      text_[at_] == '\n' || text_[at_] == '\r'))
            ++at_;
    }

    char peek() const { return at_ < text_.size() ? text_[at_] : '\0'; }

    bool take(char wanted) {
        skip();
        if (peek() != wanted || at_ == text_.size()) return false;
        ++at_;
        return true;
    }

    void word(const char* letters) {
        for (const char* c = letters; *c; ++c, ++at_)
            if (peek() != *c) fail(letters);
    }

    Json read(int depth) {
        if (depth > kDeepest) fail("fewer levels");
        skip();
        Json value;
        switch (peek()) {
            case '{': value.value_ = members(depth); break;
            case '[': value.value_ = elements(depth); break;
            case '"': value.value_ = text(); break;
            case 't': word("true"); value.value_ = true; break;
            case 'f': word("false"); value.value_ = false; break;
            case 'n': word("null"); break;
            default: value.value_ = number();
        }
        return value;
    }

    std::shared_ptr<Json::Object> members(int depth) {
        auto object = std::make_shared<Json::Object>();
        take('{');
        if (take('}')) return object;
        do {
            skip();
            if (peek() != '"') fail("a name");
            std::string name = text();
            if (!take(':')) fail("a colon");
            if (!object->emplace(name, read(depth + 1)).second) fail("another name than " + name);
        } while (take(','));
        if (!take('}')) fail("a comma or }");
        return object;
    }

    std::shared_ptr<Json::Array> elements(int depth) {
        auto array = std::make_shared<Json::Array>();
        take('[');
        if (take(']')) return array;
        do array->push_back(read(depth + 1));
        while (take(','));
        if (!take(']')) fail("a comma or ]");
        return array;
    }

    void digits() {
        if (peek() < '0' || peek() > '9') fail("a digit");
        while (peek() >= '0' && peek() <= '9') ++at_;
    }

    double number() {
        const size_t start = at_;
        if (peek() == '-') ++at_;
        const bool zero = peek() == '0';
        const size_t whole = at_;
        digits();
        if (zero && at_ > whole + 1) fail("no zero in front of a number");
        if (peek() == '.') ++at_, digits();
        if (peek() == 'e' || peek() == 'E') {
            ++at_;
            if (peek() == '+' || peek() == '-') ++at_;
            digits();
        }
        const double value = std::strtod(text_.substr(start, at_ - start).c_str(), nullptr);
        if (!std::isfinite(value)) fail("a number within range");
        return value;
    }

    unsigned hex() {
        unsigned code = 0;
        for (int i = 0; i < 4; ++i, ++at_) {
            const char c = peek();
            const int digit = c >= '0' && c <= '9'   ? c - '0'
                              : c >= 'a' && c <= 'f' ? c - 'a' + 10
                              : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                                     : -1;
            if (digit < 0) fail("four hexadecimal digits");
            code = code * 16 + static_cast<unsigned>(digit);
        }
        return code;
    }

    void escape(std::string& into) {
        const char c = peek();
        ++at_;
        switch (c) {
            case '"': case '\\': case '/': into += c; return;
            case 'b': into += '\b'; return;
            case 'f': into += '\f'; return;
            case 'n': into += '\n'; return;
            case 'r': into += '\r'; return;
            case 't': into += '\t'; return;
            case 'u': break;
            default: --at_; fail("an escape");
        }
        unsigned code = hex();
        if (code >= 0xDC00 && code < 0xE000) fail("the first half of a pair");
        if (code >= 0xD800 && code < 0xDC00) {
            word("\\u");
            const unsigned low = hex();
            if (low < 0xDC00 || low >= 0xE000) fail("the second half of a pair");
            code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
        }
        const auto put = [&into](unsigned byte) { into += static_cast<char>(byte); };
        if (code < 0x80) return put(code);
        if (code < 0x800) return put(0xC0 | code >> 6), put(0x80 | (code & 0x3F));
        if (code < 0x10000) {
            put(0xE0 | code >> 12);
        } else {
            put(0xF0 | code >> 18);
            put(0x80 | (code >> 12 & 0x3F));
        }
        put(0x80 | (code >> 6 & 0x3F));
        put(0x80 | (code & 0x3F));
    }

    std::string text() {
        std::string value;
        ++at_;
        while (peek() != '"') {
            if (at_ == text_.size()) fail("the end of a string");
            const unsigned char c = static_cast<unsigned char>(text_[at_++]);
            if (c < 0x20) fail("no control character in a string");
            if (c == '\\')
                escape(value);
            else
                value += static_cast<char>(c);
        }
        ++at_;
        return value;
    }

    const std::string& text_;
    size_t at_ = 0;
};

Json Json::parse(const std::string& text) { return JsonReader(text).whole(); }

template <class T>
const T& Json::get(const char* what) const {
    const T* value = std::get_if<T>(&value_);
    if (!value) throw std::runtime_error(std::string("JSON: found another value; needed ") + what);
    return *value;
}

template const bool& Json::get<bool>(const char*) const;
template const double& Json::get<double>(const char*) const;
template const std::string& Json::get<std::string>(const char*) const;
template const std::shared_ptr<Json::Array>& Json::get<std::shared_ptr<Json::Array>>(
    const char*) const;
template const std::shared_ptr<Json::Object>& Json::get<std::shared_ptr<Json::Object>>(
    const char*) const;

long long Json::integer() const {
    const double value = number();
    if (value != std::floor(value) || std::abs(value) > 9007199254740992.0)
        throw std::runtime_error("JSON: found a number that is not whole; needed a whole one");
    return static_cast<long long>(value);
}

const Json& Json::operator[](const std::string& key) const {
    const auto place = object().find(key);
    if (place == object().end()) throw std::runtime_error("JSON: found no member " + key);
    return place->second;
}

const Json& Json::find(const std::string& key) const {
    static const Json null;
    const auto place = object().find(key);
    return place == object().end() ? null : place->second;
}

}  // namespace hdrq
