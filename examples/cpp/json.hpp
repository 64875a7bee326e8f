// A strict reader of JSON (RFC 8259): no comments, no trailing commas, no duplicate keys.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <variant>
#include <vector>

namespace hdrq {

// One JSON value. Access to another kind than the value's own throws std::runtime_error.
class Json {
public:
    using Array = std::vector<Json>;
    using Object = std::map<std::string, Json>;

    // Reads a whole text; throws std::runtime_error with the position of what is wrong.
    static Json parse(const std::string& text);

    bool is_null() const { return std::holds_alternative<std::nullptr_t>(value_); }
    bool is_string() const { return std::holds_alternative<std::string>(value_); }
    bool boolean() const { return get<bool>("true or false"); }
    double number() const { return get<double>("a number"); }
    // A number that is whole and fits 53 bits.
    long long integer() const;
    const std::string& string() const { return get<std::string>("a string"); }
    const Array& array() const { return *get<std::shared_ptr<Array>>("an array"); }
    const Object& object() const { return *get<std::shared_ptr<Object>>("an object"); }
    // The member of an object; throws where it is missing.
    const Json& operator[](const std::string& key) const;
    // The member of an object, or null where it is missing.
    const Json& find(const std::string& key) const;

private:
    friend class JsonReader;
    template <class T>
    const T& get(const char* what) const;

    std::variant<std::nullptr_t, bool, double, std::string, std::shared_ptr<Array>,
                 std::shared_ptr<Object>>
        value_ = nullptr;
};

}  // namespace hdrq
